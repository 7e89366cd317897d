"""A student of a release: what is to be trained, found out before any rank starts, and what becomes of the result.

DIR/job.json        what is trained, of what: the ranks read it, and another training is refused here
DIR/state/          states to go on from (models.distill.state)
DIR/loss.csv        the loss curve
DIR/weights/        the averaged weights, once the ranks have ended
DIR/evaluation.json teacher against student
DIR                 the student, a checkpoint in the format of diffusers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.storage import Storage, make_folder, replacing
from models.hand_off import check_hand_off
from models.loading import TeacherRef
from models.source import content_sha256, resolve
from pipelines import samples as stored
from pipelines.distill_settings import Distill
from pipelines.distill_stream import Wanted, read, sampled, text_length
from pipelines.regenerate import generator_settings

if TYPE_CHECKING:
    from models.distill.schedule import Schedule

TRAIN, HELD_OUT = "train", "validation"
"""Splits of a release."""

FEW_STEPS = 4
"""Of a student whose method asks for no number."""


@dataclass(frozen=True)
class Job:
    """One training, as its ranks and later invocations read it."""

    storage: dict[str, Any]
    release: str
    release_sha256: str
    """Of the release's manifest."""
    teacher: str
    """As the dataset names it."""
    teacher_path: str
    teacher_sha256: str
    teacher_guidance_scale: float
    settings: dict[str, Any]
    num_inference_steps: int
    shift: float | None
    """Of the samples' scheduler."""
    text_length: int
    places: tuple[int, ...] | None
    """States that are read of each path."""
    path_steps: int
    sigmas: tuple[float, ...]
    """At each place, what the student is trained with."""
    timesteps: tuple[float, ...]
    start_path: str | None = None
    """Checkpoint of the first weights, where it is not the teacher."""
    start_sha256: str | None = None
    sampled: dict[str, Any] | None = None
    """Of the samples' plan, as `distill_stream.sampled` says it."""
    latent_shape: tuple[int, ...] | None = None
    """What the student makes, where the method learns from texts alone."""
    media_shape: tuple[int, ...] | None = None
    """The same of media: height, width, frames."""

    @property
    def config(self) -> Distill:
        return Distill.model_validate(self.settings)

    @property
    def source(self) -> Storage:
        return Storage(**self.storage)

    @property
    def wanted(self) -> Wanted:
        plan = (self.teacher_guidance_scale, self.shift, self.text_length)
        negative = self.config.method == "distribution" and self.teacher_guidance_scale > 1
        shapes = (self.latent_shape, self.media_shape)
        return Wanted(self.teacher_sha256, *plan, self.places, self.path_steps, negative, *shapes, self.sampled)

    def identity(self) -> dict[str, Any]:
        """What must be the same to go on: where things lie may change, what they are may not."""
        kept = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("storage", "teacher_path", "start_path", "settings")
        }
        return json.loads(json.dumps({**kept, "dataset": self.storage["root"], "settings": self.config.identity()}))

    def write(self, folder: Path) -> None:
        with replacing(folder / "job.json") as file:  # without it what was trained could not be gone on with
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Job:
        said: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        lists: dict[str, Any] = {name: tuple(value) for name, value in said.items() if isinstance(value, list)}
        return cls(**said | lists)


def prepare(storage: Storage, release: str, settings: Distill, out: Path) -> Job:
    """What is trained, written to `out`. UserError where the release lacks what the method reads, its model cannot have a
    student, or `out` holds another training."""
    from models.distill.assemble import check_teacher, load_scheduler
    from models.distill.schedule import Schedule, student_scheduler
    from pipelines.release import read_release

    read_release(storage, release)
    manifest = storage.read_bytes(f"releases/{release}/manifest.json")
    first = next((sample for sample in stored.read_samples(storage, release) if sample.row["split"] == TRAIN), None)
    if first is None:
        raise UserError(f"--release {release}: it has no samples of split {TRAIN}")
    row = first.row
    path = resolve(row["model"], "generator", generator_settings(storage, row).get("revision"), key="teacher")
    if (found := content_sha256(path)) != row["model_sha256"]:
        raise UserError(
            f"teacher: {row['model']} has changed since it made the samples (sha256 {found[:12]}, they say"
            f" {row['model_sha256'][:12]}); put the old one back"
        )
    check_teacher(path)
    _check_plan(settings, sampled(row))
    start = _start(settings, row, path)
    shift = json.loads(row["plan_json"]).get("shift")
    scheduler = student_scheduler(load_scheduler(path), shift)
    places, path_steps, steps = _path_of(first, settings)
    schedule = Schedule.of(scheduler, steps)
    sigmas, timesteps = _levels(first, settings, places, schedule)
    job = Job(
        storage={field.name: getattr(storage, field.name) for field in fields(storage)},
        release=release,
        release_sha256=hashlib.sha256(manifest).hexdigest(),
        teacher=row["model"],
        teacher_path=path,
        teacher_sha256=row["model_sha256"],
        teacher_guidance_scale=row["guidance_scale"],
        settings=settings.model_dump(mode="json"),
        num_inference_steps=steps,
        shift=shift,
        text_length=text_length(row),
        places=places,
        path_steps=path_steps,
        sigmas=sigmas,
        timesteps=timesteps,
        start_path=start,
        start_sha256=start and content_sha256(start),
        sampled=sampled(row),
        **_shapes(settings, row, path),
    )
    read([first], job.wanted)  # what the release lacks is told now
    _refuse_other(job, out)
    make_folder("--out", out)
    job.write(out)
    return job


def _shapes(settings: Distill, row: Mapping[str, Any], teacher: str) -> dict[str, tuple[int, ...]]:
    """What a method that learns from texts alone makes."""
    from models.distill.assemble import latent_shape

    if settings.method != "distribution":
        return {}
    media = (row["height"], row["width"], row["num_frames"])
    return {"latent_shape": stored.latent_shape(row) or latent_shape(teacher, *media), "media_shape": media}


def _check_plan(settings: Distill, plan: Mapping[str, Any]) -> None:
    if settings.method == "trajectory" and plan["sigmas"] is not None:
        raise UserError(
            "method: the samples' plan gives sigmas of its own (sampler.sigmas), and a student of trajectory steps along"
            " those of a shift; sample with shift instead, or take another method"
        )
    if settings.method == "distribution" and plan["accelerate"] is not None:
        techniques = ", ".join(item["technique"] for item in plan["accelerate"])
        raise UserError(
            f"method: distribution asks the teacher with its plain guidance, and the samples' plan has {techniques}; sample"
            " without, or take another method"
        )


def _start(settings: Distill, row: Mapping[str, Any], teacher: str) -> str | None:
    """Where the first weights lie, if not in the teacher."""
    from models.distill.assemble import check_teacher

    if settings.start is None:
        return None
    path = resolve(settings.start, "generator", key="start")
    try:
        check_teacher(path)
        check_hand_off(path, TeacherRef(teacher, row["model"], row["model_sha256"], 0, 1.0))
    except UserError as error:
        raise UserError(f"start: {error}") from error
    ours, theirs = (_sizes(folder) for folder in (path, teacher))
    if differing := sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]):
        raise UserError(
            f"start: {settings.start} and the teacher differ in {', '.join(differing)} of the transformer; name a checkpoint"
            " of the teacher's architecture"
        )
    return path


def _sizes(folder: str) -> dict[str, Any]:
    """The configuration of a transformer, but for who wrote it."""
    from diffusers import WanTransformer3DModel

    config = WanTransformer3DModel.load_config(folder, subfolder="transformer")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _path_of(sample: stored.StoredSample, settings: Distill) -> tuple[tuple[int, ...] | None, int, int]:
    """Places that are read, the teacher's steps, and the student's."""
    wanted = settings.num_inference_steps
    if settings.method == "reflow":
        return None, 0, wanted or (1 if settings.reflow.stages[-1] == "distill" else FEW_STEPS)
    if settings.method == "distribution":
        return None, 0, wanted or FEW_STEPS
    if settings.method == "consistency":
        if settings.consistency.along == "coupling":
            return None, 0, wanted or 1
        path = sample.trajectory()
        return tuple(sorted({0, *path.places, path.steps})), path.steps, wanted or 1
    path = sample.trajectory()
    chosen = settings.trajectory.places
    if chosen is not None:
        places = tuple(sorted({place if place >= 0 else path.steps + 1 + place for place in chosen}))
        if (places[0], places[-1]) != (0, path.steps):
            raise UserError(
                f"trajectory.places: expected them to go from 0 to {path.steps} (or -1), found {list(chosen)}"
            )
    elif wanted is not None:
        if wanted > path.steps:
            raise UserError(
                f"num_inference_steps: the teacher took {path.steps} steps, found {wanted}; a student takes at most as many"
            )
        places = tuple(round(at * path.steps / wanted) for at in range(wanted + 1))
    else:
        places = tuple(sorted({0, *path.places, path.steps}))
    if wanted not in (None, len(places) - 1):
        raise UserError(
            f"num_inference_steps: trajectory.places have {len(places) - 1} steps between them, found {wanted}"
        )
    return places, path.steps, len(places) - 1


def _levels(
    sample: stored.StoredSample, settings: Distill, places: tuple[int, ...] | None, schedule: Schedule
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sigmas and timesteps at the places. Where the student steps from place to place they are its own schedule's, so that
    what it learns is what it will do, however the teacher's places lie; elsewhere the teacher's."""
    if settings.method == "trajectory":
        return schedule.sigmas, (*schedule.timesteps, 0.0)
    if places is None:
        return (), ()
    path = sample.trajectory()
    at = dict(zip(path.places, zip(path.sigmas, path.timesteps, strict=True), strict=True))
    at.setdefault(0, (schedule.sigmas[0], schedule.timesteps[0]))
    at.setdefault(path.steps, (0.0, 0.0))
    return tuple(at[place][0] for place in places), tuple(at[place][1] for place in places)


def _refuse_other(job: Job, out: Path) -> None:
    try:
        before = Job.read(out).identity()
    except FileNotFoundError:
        if (out / "model_index.json").exists():
            raise UserError(
                f"--out {out}: there is a checkpoint here that was not trained here; name another"
            ) from None
        return
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"--out {out}: its job.json cannot be read ({error}); name another folder") from error
    for key, was, now in _differences("", before, job.identity()):
        raise UserError(
            f"--out {out}: it holds another training, {key} was {was} and is {now}; name another folder, or make it the same"
            " to go on"
        )


def _differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}):
            yield from _differences(f"{key}.{name}".lstrip("."), before.get(name), now.get(name))
    elif before != now:
        yield key.removeprefix("settings."), before, now


def assemble(job: Job, out: Path, trained: int) -> None:
    """Make the checkpoint of the averaged weights that the ranks have left in `out`/weights."""
    from safetensors.torch import load_file

    from models.distill.assemble import load_scheduler, write_student
    from models.distill.schedule import student_scheduler

    settings = job.config
    start = settings.start if "://" in (settings.start or "") else settings.start and Path(settings.start).name
    facts = {
        "teacher": job.teacher,
        "teacher_sha256": job.teacher_sha256,
        "teacher_guidance_scale": job.teacher_guidance_scale,
        "method": settings.method,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": 1,
        "dataset": job.storage["root"] if "://" in job.storage["root"] else Path(job.storage["root"]).name,
        "release": job.release,
        "release_sha256": job.release_sha256,
        **({"start": start, "start_sha256": job.start_sha256} if start else {}),
        "trained_steps": trained,
        "max_sequence_length": job.text_length,
        "config": settings.model_dump(mode="json", exclude={"start"}),
    }
    weights = load_file(out / "weights" / "average.safetensors")
    scheduler = student_scheduler(load_scheduler(job.teacher_path), job.shift)
    write_student(job.teacher_path, out, weights, scheduler, facts, _card(job, facts))


def _card(job: Job, facts: Mapping[str, Any]) -> str:
    licence = _licence(Path(job.teacher_path, "README.md"))
    front = "\n".join(["---", *licence, "library_name: diffusers", "pipeline_tag: text-to-video", "---"])
    return f"""{front}

# A student of {facts["teacher"]}

Trained by `ditmill distill` for {facts["trained_steps"]} steps, method {facts["method"]}, on release {facts["release"]} of
{facts["dataset"]}. Its teacher's sha256 is {facts["teacher_sha256"]}.

Call it with `num_inference_steps={facts["num_inference_steps"]}, guidance_scale=1,
max_sequence_length={facts["max_sequence_length"]}`: the teacher's guidance is in its weights. In a spec:

    generators: [{{model: THIS FOLDER}}]
    sampler: {{num_inference_steps: {facts["num_inference_steps"]}, guidance_scale: 1}}

`ditmill.json` holds the same and all settings.
"""


def _licence(card: Path) -> list[str]:
    """The lines of the teacher's card that say its licence."""
    try:
        lines = card.read_text(encoding="utf-8").split("\n---", 1)[0].splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(("license:", "license_name:", "license_link:"))]


def held_out(job: Job) -> list[stored.StoredSample]:
    """Samples of the split validation, as many as are evaluated: none where the release holds texts alone."""
    samples = (one for one in stored.read_samples(job.source, job.release) if one.row["split"] == HELD_OUT)
    sampled = (one for one in samples if job.latent_shape is None or one.row["tensors"])
    return list(islice(sampled, job.config.evaluate.samples))
