"""One sample made again from its row, in this process, and compared with what is stored of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from infra.errors import UserError
from infra.storage import Storage
from infra.tables import Table
from models.accelerate.registry import decides_by_data
from models.loading import GeneratorRef, TeacherRef
from models.plan import SamplerPlan
from models.source import content_sha256, resolve
from pipelines.kept import told
from stages.batch import STOPPED, Batch, texts
from stages.decode import DecodeLatents
from stages.early import NAME
from stages.encode import EncodeText
from stages.sample import SampleLatents

if TYPE_CHECKING:
    from infra.media import Encoded

Row = dict[str, Any]


@dataclass(frozen=True)
class Regenerated:
    """How a sample came out the second time.

    `media`, `latents`, `trajectory` and `text` are `same` (bit for bit), `different`, or `not stored`. Where they differ,
    `psnr` is that of the decoded media in dB (8-bit), `latents_difference` the largest absolute one.
    """

    sample_id: str
    media: str
    psnr: float | None
    latents: str
    latents_difference: float | None
    device: str
    stored_device: str
    seconds: float
    trajectory: str = "not stored"
    text: str = "not stored"
    promise: str = "to the bit"
    """How alike they are to be; `to float tolerance` of a plan whose techniques decide by a sample's own data, and of a
    sample whose batch went on smaller because others were stopped."""

    @property
    def is_same(self) -> bool:
        return "different" not in (self.media, self.latents, self.trajectory, self.text)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        media = self.media if self.psnr is None else f"{self.media} (PSNR {self.psnr:.1f} dB)"
        difference = self.latents_difference
        latents = self.latents if difference is None else f"{self.latents} (at most {difference:.3g} apart)"
        where = (
            self.device if self.device == self.stored_device else f"{self.device}, first made on {self.stored_device}"
        )
        more = {"trajectory": self.trajectory, "text": self.text}
        latents += "".join(f"; {name} {said}" for name, said in more.items() if said != "not stored")
        return f"{self.sample_id}: media {media}; latents {latents}; {self.seconds:.1f} s on {where}"


def regenerate(storage: Storage, sample_id: str) -> Regenerated:
    """Make a sample again.

    Everything comes from its row: prompt, noise, checkpoint, plan, layout. The spec of its run says only what the row does
    not: which revision, and whether remote code may run. UserError for a sample that is not there or whose checkpoint is
    gone or has changed.
    """
    # Before torch is imported: without it a sample's bits change with its slot in the batch.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    row = _row(storage, sample_id)
    if row["recipe"] == "curate":
        raise UserError(f"{sample_id}: it was cut out of {row['inputs'][0]['uri']}, not generated; cut it there again")
    began = time.perf_counter()
    batch = _make(row, _generator(storage, row))
    if batch["error_type"][0]:
        raise UserError(f"{sample_id}: failed this time with {batch['error_type'][0]}: {batch['error'][0]}")
    seconds = time.perf_counter() - began
    media, psnr = _compare_media(storage, row, batch["frames"][0]) if "frames" in batch else ("not stored", None)
    latents, difference = _compare_tensor(storage, row, "latents", batch)
    return Regenerated(
        sample_id,
        media,
        psnr,
        latents,
        difference,
        _device(),
        row["device"] or "",
        round(seconds, 2),
        _compare_tensor(storage, row, "trajectory", batch)[0],
        _compare_text(storage, row, batch),
        "to float tolerance" if decides_by_data(_plan(row)) or _was_cut(row) else "to the bit",
    )


def _row(storage: Storage, sample_id: str) -> Row:
    rows = Table(storage, "samples").read(None, pc.field("sample_id") == sample_id).to_pylist()
    if rows:
        return dict(rows[0])
    failures = Table(storage, "failures").read(None, pc.field("sample_id") == sample_id).to_pylist()
    if failures:
        last = max(failures, key=lambda row: row["attempt"])
        how = "--retry-early` finishes it" if last["error_type"] == STOPPED else "--retry-failed` tries it again"
        raise UserError(f"{sample_id}: was never made ({last['error_type']}: {last['error']}); `ditmill run SPEC {how}")
    raise UserError(f"{storage.root}: has no sample {sample_id!r}")


def _generator(storage: Storage, row: Row) -> GeneratorRef:
    """The checkpoint of a row, which must be the very one."""
    settings = generator_settings(storage, row)
    folder = resolve(row["model"], "generator", settings.get("revision"))
    _check_content(row["model"], folder, row["model_sha256"])
    adapters = []
    for adapter in row["adapters"] or ():
        path = resolve(adapter["uri"], "adapter")
        _check_content(adapter["uri"], path, adapter["sha256"])
        adapters.append((path, adapter["weight"]))
    teacher = json.loads(row["plan_json"] or "{}").get("teacher")
    if teacher is not None:
        path = resolve(teacher["model"], "generator", key="generators.teacher")
        _check_content(teacher["model"], path, teacher["sha256"])
        teacher = TeacherRef(path=path, **teacher)
    layout = json.loads(row["layout_json"] or "{}")
    return GeneratorRef(
        path=folder,
        adapters=tuple(adapters),
        dtype=_plan(row).dtype,  # type: ignore[arg-type]
        offload=layout.get("offload", "none"),
        compile=layout.get("compile", False),
        vae_tiling=layout.get("vae_tiling", False),
        attention=layout.get("attention", "native"),
        remote_code=settings.get("remote_code"),
        revision=settings.get("revision"),
        teacher=teacher,
    )


def _check_content(uri: str, path: str, expected: str) -> None:
    found = content_sha256(path)
    if found != expected:
        raise UserError(
            f"{uri}: the checkpoint has changed: expected content sha256 {expected[:12]}, found {found[:12]};"
            " put the old one back to make the sample again"
        )


def generator_settings(storage: Storage, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the spec of the row's run says of its generator."""
    runs = Table(storage, "runs").read(["spec_json"], pc.field("run_id") == row["run_id"])["spec_json"].to_pylist()
    for text in runs:
        for generator in json.loads(text or "{}").get("generators", ()):
            if generator.get("model") == row["model"]:
                return dict(generator)
    return {}


def _plan(row: Row) -> SamplerPlan:
    """The plan as it was asked for, which the row keeps inside of the plan as it was run."""
    said = json.loads(row["plan_json"] or "{}")
    asked = said.get("plan", said)
    try:
        return SamplerPlan.from_dict(asked)
    except TypeError as error:
        raise UserError(f"{row['sample_id']}: plan_json is of another version of ditmill ({error})") from error


def _was_cut(row: Row) -> bool:
    said = json.loads(row["extra_json"] or "{}").get(NAME)
    return isinstance(said, dict) and "batch" in said


def _make(row: Row, generator: GeneratorRef) -> Batch:
    """The batch of this one sample after the generator's stages, padded as it was."""
    layout = json.loads(row["layout_json"] or "{}")
    settings = ((generator,), _plan(row), layout.get("batch_size", 1), layout.get("threads", 1))
    inputs = [{key: value for key, value in item.items() if value is not None} for item in row["inputs"] or ()]
    batch: Batch = {
        "inputs": texts([json.dumps(inputs)]),
        "tags": texts([json.dumps(row["tags"] or [])]),
        "extra": texts([row["extra_json"] or "{}"]),
        "generator": np.zeros(1, np.int64),
        "attempt": np.ones(1, np.int64),
        "fps": np.array([row["fps"]], np.float64),
        "batch_index": np.zeros(1, np.int64),
    }
    for name in ("sample_id", "noise_key", "prompt_id", "source_prompt", "prompt", "negative_prompt"):
        batch[name] = texts([row[name] or ""])
    for name in ("height", "width", "num_frames", "sample_index", "seed"):
        batch[name] = np.array([row[name]], np.int64)
    for name in ("error_type", "error", "error_stage", "licence"):
        batch[name] = texts([""])
    said = told(row)
    states = said.get("trajectory", {}).get("places", ())
    encode = EncodeText(*settings, keep_text="float32" if "text_id" in said else "")
    rest = (
        (SampleLatents(*settings, keep=tuple(states)), DecodeLatents(*settings)) if row["recipe"] != "prompts" else ()
    )
    for stage in (encode, *rest):
        stage.load()
        batch = stage(batch)
        if batch["error_type"][0]:
            break
    return batch


def _compare_media(storage: Storage, row: Row, frames: np.ndarray) -> tuple[str, float | None]:
    from infra.media import decode

    if not row["media"]:
        return "not stored", None
    item = row["media"][0]
    made = _encoded(item, frames, row["fps"])
    if hashlib.sha256(made.data).hexdigest() == item["sha256"]:
        return "same", None
    try:
        stored = storage.read_bytes(item["shard"], item["offset"], item["offset"] + item["nbytes"])
        before, now = decode(stored, made.suffix), decode(made.data, made.suffix)
    except Exception as error:
        raise UserError(
            f"{item['shard']} {item['member']}: what is stored cannot be read ({type(error).__name__}: {error})"
        ) from error
    return "different", _psnr(before, now) if before.shape == now.shape else None


def _encoded(item: Mapping[str, Any], frames: np.ndarray, fps: float) -> Encoded:
    """`frames` as the stored file was encoded."""
    from infra.media import encode, preview_strip

    if item["role"] == "preview":
        return preview_strip(frames)
    crf = re.search(r"\bcrf=(\d+)", item["codec"] or "")
    image_format = "webp" if item["mime"] == "image/webp" else "png"
    marked = " xmp=" in (item["codec"] or "")
    return encode(frames, fps, image_format, int(crf[1]) if crf else 18, marked=marked)


def _psnr(before: np.ndarray, now: np.ndarray) -> float | None:
    """dB; None where the pixels are equal."""
    error = float(np.mean((before.astype(np.float64) - now) ** 2))
    return None if error == 0 else 10 * math.log10(255**2 / error)


def _compare_tensor(storage: Storage, row: Row, role: str, batch: Batch) -> tuple[str, float | None]:
    from infra.shard import read_safetensors, safetensors_bytes

    item = next((item for item in row["tensors"] or () if item["role"] == role), None)
    if item is None or role not in batch:
        return "not stored", None
    try:
        data = storage.read_bytes(item["shard"], item["offset"], item["offset"] + item["nbytes"])
        stored = read_safetensors(data, role)
    except (OSError, ValueError) as error:
        raise UserError(f"{item['shard']} {item['member']}: what is stored cannot be read ({error})") from error
    made = read_safetensors(safetensors_bytes(role, batch[role][0], item["dtype"], {}), role)
    if made.shape != stored.shape:
        return "different", None
    difference = float(np.abs(made - stored).max())
    return ("same", None) if np.array_equal(made, stored) else ("different", difference)


def _compare_text(storage: Storage, row: Row, batch: Batch) -> str:
    """Whether its texts have the ids that they had, which name the encoder's content, and the values."""
    from infra.shard import read_arrays, safetensors_of

    said, compared = told(row), "not stored"
    for name in ("text", "negative_text"):
        text_id = said.get(f"{name}_id")
        rows = Table(storage, "embeddings").read(["tensors"], pc.field("text_id") == text_id) if text_id else None
        if rows is None or not rows.num_rows:
            continue
        item = rows["tensors"][0].as_py()[0]
        stored = read_arrays(storage.read_bytes(item["shard"], item["offset"], item["offset"] + item["nbytes"]))
        if batch[f"{name}_id"][0] != text_id:
            return "different"
        made = read_arrays(safetensors_of(read_arrays(batch[name][0]), item["dtype"], {}))
        if set(made) != set(stored) or any(not np.array_equal(made[key], stored[key]) for key in made):
            return "different"
        compared = "same"
    return compared


def _device() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
