"""A student of a release from start to end, and what is refused before anything starts."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flows.distill import run_distill, told
from infra.errors import UserError
from infra.storage import Storage
from models.distill.assemble import latent_shape
from models.source import content_sha256
from pipelines import distill, distill_stream, release
from pipelines import samples as stored
from pipelines.distill import Job, prepare
from pipelines.distill_evaluate import share
from pipelines.distill_run import publish, train, world_of
from pipelines.distill_settings import Distill, load_settings
from pipelines.distill_stream import Wanted, batches, drawn, padded, read, states

_file = Path(__file__).parent / "distill_rank.py"
_spec = importlib.util.spec_from_file_location("made_up_samples", _file)
assert _spec is not None
assert _spec.loader is not None
made_up = importlib.util.module_from_spec(_spec)
sys.modules["made_up_samples"] = made_up
_spec.loader.exec_module(made_up)

SETTINGS: dict[str, Any] = {
    "method": "trajectory",
    "steps": 6,
    "batch_size": 2,
    "checkpoint_steps": 2,
    "log_steps": 1,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
    "evaluate": {"samples": 3, "batch_size": 2},
}


@pytest.fixture
def teacher(tiny_pack: Path) -> str:
    return content_sha256(str(tiny_pack / "generator"))


@pytest.fixture
def storage(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A dataset with a release of twenty made-up samples."""
    monkeypatch.setattr(distill.stored, "read_samples", lambda *_, **__: made_up.samples(teacher))
    monkeypatch.setattr(release, "read_release", lambda *_: None)
    made = Storage(str(tmp_path / "dataset"))
    made.write_bytes("releases/v1/manifest.json", b"{}")
    return made


def settings(**keys: Any) -> Distill:
    return Distill.model_validate(SETTINGS | keys)


def test_a_student_is_trained_killed_trained_on_and_runs_as_a_checkpoint(storage: Storage, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "student"
    job = prepare(storage, "v1", settings(), out)
    assert (job.num_inference_steps, job.places, job.text_length) == (2, (0, 2, 4), 8)
    command = [sys.executable, str(_file)]
    heard: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILLED_AT", "3")
        with pytest.raises(RuntimeError, match="run it again to go on"):
            train(job, out, 60.0, command=command)
    assert prepare(storage, "v1", settings(log_steps=2), out).places == (
        0,
        2,
        4,
    )  # how often it logs is no other training
    assert train(job, out, 60.0, heard.append, command=command) == 6
    assert [line["step"] for line in heard if line["event"] == "progress"] == [4, 6]
    with (out / "loss.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 4, 6]

    uninterrupted = tmp_path / "uninterrupted"
    assert train(prepare(storage, "v1", settings(), uninterrupted), uninterrupted, 60.0, command=command) == 6
    average = Path("weights", "average.safetensors")
    assert (out / average).read_bytes() == (uninterrupted / average).read_bytes()

    assert train(job, out, 60.0, command=["false"]) == 6  # nothing is left to do for ranks
    found = publish(job, out, 6)
    assert found is not None
    assert (found.samples, found.nfe, found.accuracy) == (3, {"teacher": 8.0, "student": 2.0}, None)
    assert 0 < found.rmse < 2
    assert -1 <= found.cosine <= 1
    assert json.loads((out / "evaluation.json").read_text())["rmse"] == found.rmse
    facts = json.loads((out / "ditmill.json").read_text())
    assert (facts["teacher"], facts["num_inference_steps"], facts["guidance_scale"]) == ("pack://tiny", 2, 1)
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "ditmill.json").read_text()
    _is_an_ordinary_checkpoint(job, out)


def _is_an_ordinary_checkpoint(job: Job, out: Path) -> None:
    """diffusers alone makes what ditmill's generator makes, and both take Euler's steps with the trained weights."""
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    pipe = DiffusionPipeline.from_pretrained(out, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    trained = load_file(out / "weights" / "average.safetensors")
    for name, value in pipe.transformer.named_parameters():
        assert torch.equal(value, trained[name]), name
    sample = next(made_up.samples(job.teacher_sha256))
    noise = torch.from_numpy(sample.noise())[None]
    embeds = torch.from_numpy(padded(sample.text()["prompt_embeds"], 8))[None]
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    made = pipe(prompt_embeds=embeds, latents=noise, output_type="latent", **arguments)[0]
    x = noise
    with torch.no_grad():
        for at in range(2):
            timestep = torch.tensor([job.timesteps[at]])
            velocity = pipe.transformer(x, timestep, embeds, return_dict=False)[0]
            x = x + (job.sigmas[at + 1] - job.sigmas[at]) * velocity
    torch.testing.assert_close(made, x, atol=1e-5, rtol=1e-4)


def test_no_minutes_prepare_a_training_for_ranks_of_others(storage: Storage, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    out = tmp_path / "student"
    made = run_distill(storage, "v1", settings(), out, 0.0, as_json=True)
    assert made == {"student": str(out), "status": "prepared", "job": str(out / "job.json")}
    assert Job.read(out).config.steps == 6
    assert [path.name for path in out.iterdir()] == ["job.json"]
    assert told(made).startswith(f"{out / 'job.json'}: start its ranks")


def test_another_training_in_the_same_folder_is_refused(storage: Storage, tmp_path: Path) -> None:
    prepare(storage, "v1", settings(), tmp_path / "student")
    with pytest.raises(UserError, match=r"another training, optimizer.learning_rate was 0.001 and is 0.002"):
        prepare(storage, "v1", settings(optimizer={"learning_rate": 2e-3, "warmup_steps": 1}), tmp_path / "student")
    storage.write_bytes("releases/v2/manifest.json", b"{}")
    with pytest.raises(UserError, match="release was v1 and is v2"):
        prepare(storage, "v2", settings(), tmp_path / "student")


def test_a_checkpoint_that_was_not_trained_here_is_not_overwritten(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="not trained here"):
        prepare(storage, "v1", settings(), tmp_path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"trajectory": {"places": [0, 1, -1]}}, r"trajectory.places: expected states \[0, 1, 4\]"),
        ({"trajectory": {"places": [2, -1]}}, "expected them to go from 0 to 4"),
        ({"num_inference_steps": 7}, "num_inference_steps: the teacher took 4 steps, found 7"),
        ({"num_inference_steps": 4}, r"expected states \[0, 1, 2, 3, 4\] of 4 steps, found \[0, 2, 4\]"),
    ],
)
def test_places_that_are_not_kept_are_named(storage: Storage, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare(storage, "v1", settings(**keys), tmp_path / "student")


def test_a_dataset_without_paths_a_changed_teacher_and_other_families_are_refused(
    storage: Storage, tmp_path: Path, teacher: str, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "student"
    monkeypatch.setattr(distill.stored, "read_samples", lambda *_, **__: made_up.samples(teacher, kept=()))
    with pytest.raises(UserError, match="keeps no trajectories"):
        prepare(storage, "v1", settings(), out)
    assert prepare(storage, "v1", settings(method="reflow"), out).num_inference_steps == 1  # needs none
    monkeypatch.setattr(distill.stored, "read_samples", lambda *_, **__: made_up.samples("0" * 64))
    with pytest.raises(UserError, match="has changed since"):
        prepare(storage, "v1", settings(), tmp_path / "other")

    from models.distill import assemble

    monkeypatch.setattr(distill.stored, "read_samples", lambda *_, **__: made_up.samples(teacher))
    monkeypatch.setattr(assemble, "read_index", lambda path: {"_class_name": "FluxPipeline"})
    with pytest.raises(UserError, match="FluxPipeline"):
        prepare(storage, "v1", settings(), tmp_path / "other")


def test_a_student_of_even_places_is_trained_at_its_own_schedule(storage: Storage, tmp_path: Path) -> None:
    job = prepare(storage, "v1", settings(), tmp_path / "student")
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(2)
    assert job.sigmas == tuple(scheduler.sigmas.double().tolist())
    assert job.timesteps == (*scheduler.timesteps.double().tolist(), 0.0)


def test_an_epoch_shows_each_sample_once_and_each_epoch_another_order() -> None:
    order = drawn(lambda: made_up.samples("t"), "train", seed=0, window=4)
    first, second = ([sample.number for sample in islice(order, 16)] for _ in range(2))
    assert sorted(first) == sorted(second) == [number for number in range(20) if number % 5 != 4]
    assert first != second
    assert first != sorted(first)


def test_going_on_draws_the_same_batches_and_reads_nothing_of_those_before() -> None:
    wanted = Wanted("t", 3.0, 3.0, 8, (0, 2, 4), made_up.STEPS)

    def stream(skipped: int, kept: list[Any]) -> list[dict[str, np.ndarray]]:
        def samples() -> Any:
            for sample in made_up.samples("t"):
                kept.append(sample)
                yield sample

        return list(islice(batches(drawn(samples, "train", 3, 8), wanted, 2, skipped), 4))

    whole = stream(0, [])
    seen: list[Any] = []
    resumed = stream(2, seen)
    for before, after in zip(whole[2:], resumed, strict=False):
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert before.keys() == {"noise", "latents", "prompt_embeds", "states"}
    assert before["states"].shape == (2, 3, *made_up.SHAPE)
    assert sum(not sample.read for sample in seen) >= 4


def test_a_release_without_the_split_and_one_of_two_teachers_are_refused() -> None:
    with pytest.raises(UserError, match="no samples of split test"):
        next(drawn(lambda: made_up.samples("t"), "test", 0, 8))
    order = drawn(lambda: made_up.samples("somebody"), "train", 0, 8)
    with pytest.raises(UserError, match="made by another model"):
        next(batches(order, Wanted("t", 3.0, 3.0, 8, None), 2, 0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_scale": 1.0}, "'guidance_scale': 1.0"),
        ({"plan_json": '{"max_sequence_length": 8, "shift": 8.0}'}, "'shift': 8.0"),
        ({"plan_json": '{"max_sequence_length": 9, "shift": 3.0}'}, "'max_sequence_length': 9"),
        ({"adapters": [{"uri": "style.safetensors"}]}, "sampled with adapters"),
        ({"plan_json": '{"max_sequence_length": 8, "shift": 3.0, "teacher": {"steps": 1}}'}, "teacher's first steps"),
    ],
)
def test_samples_that_were_not_made_as_the_others_are_refused(changes: dict[str, Any], said: str) -> None:
    sample = next(made_up.samples("t"))
    wanted = Wanted("t", 3.0, 3.0, 8, None)
    assert read([sample], wanted)
    with pytest.raises(UserError, match=f"^--release: .*{said}"):
        read([sample, replace(sample, row={**sample.row, **changes})], wanted)


def test_a_stop_before_the_ranks_have_begun_is_no_crash(storage: Storage, tmp_path: Path) -> None:
    job = prepare(storage, "v1", settings(), tmp_path / "student")
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(UserError, match="run the same command again"):
        train(job, tmp_path / "student", 60.0, stop=lambda: True, command=command)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_of(settings(deepspeed={"ranks": 2})) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert world_of(settings()) == 1
    with pytest.raises(UserError, match=r"^deepspeed\.ranks: .*found 2 and 1 GPUs"):
        world_of(settings(deepspeed={"ranks": 2}))


def test_a_release_that_the_stages_made_is_learnt_from_and_its_student_is_no_teacher_of_two(
    generate_from: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    made: dict[str, Any] = {
        "recipe": "trajectory",
        "trajectory": {"keep": "all", "dtype": "float32"},
        "judge": {"backend": "none"},
        "score": {"reject_static": False, "reject_duplicates": False},
        "caption": None,
        "output": {"keep_rejected": "none"},
    }
    teacher = Storage(str(generate_from(**made, sampler={"num_inference_steps": 4, "guidance_scale": 3.0})))
    release.release(teacher, "v1")
    job = prepare(teacher, "v1", settings(steps=1, num_inference_steps=2), tmp_path / "student")
    sample = next(stored.read_samples(teacher, "v1"))
    states, latents = read([sample], job.wanted)["states"][0], sample.latents()
    assert np.array_equal(states[0], sample.noise())
    assert np.array_equal(states[2], latents)
    assert train(job, tmp_path / "student", 60.0) == 1
    assert publish(job, tmp_path / "student", 1) is None  # six prompts, none of them held out

    _matches_distributions(teacher, tmp_path / "student", tmp_path / "matched")

    student = {"model": str(tmp_path / "student"), "teacher_steps": 1}  # the rest says its ditmill.json
    both = Storage(
        str(generate_from(**made, generators=[student], sampler={"num_inference_steps": 2, "guidance_scale": 1.0}))
    )
    release.release(both, "v1")
    row = next(stored.read_samples(both, "v1")).row
    assert (row["nfe"], json.loads(row["plan_json"])["teacher"]["guidance_scale"]) == (3, 3.0)
    with pytest.raises(UserError, match="teacher's first steps"):
        prepare(both, "v1", settings(), tmp_path / "other")

    wild = settings(optimizer={"learning_rate": 1e30, "warmup_steps": 0}, num_inference_steps=2)
    with pytest.raises(UserError, match=r"^optimizer\.learning_rate: the loss is"):
        train(prepare(teacher, "v1", wild, tmp_path / "wild"), tmp_path / "wild", 60.0)


def test_samples_of_sigmas_of_their_own_and_of_other_guidance_are_refused_where_they_would_mislead() -> None:
    def planned(**plan: Any) -> dict[str, Any]:
        return {"plan_json": json.dumps({"shift": None, "max_sequence_length": 8, "plan": plan})}

    given = distill_stream.sampled(planned(sigmas=[1.0, 0.5], accelerate=['{"technique":"taylorseer"}']))
    assert given == {"sigmas": [1.0, 0.5], "accelerate": None}
    rescaled = distill_stream.sampled(planned(accelerate=['{"technique":"guidance_rescale"}']))
    assert rescaled == {"sigmas": None, "accelerate": [{"technique": "guidance_rescale"}]}
    plain = distill_stream.sampled(planned())
    for method, plan, said in (
        ("trajectory", given, "sigmas of its own"),
        ("distribution", rescaled, "guidance_rescale"),
    ):
        distill._check_plan(settings(method=method), plain)
        with pytest.raises(UserError, match=rf"^method: .*{said}"):
            distill._check_plan(settings(method=method), plan)
    row = made_up.row(0, "t")
    wanted = Wanted("t", 3.0, 3.0, 8, None, sampled=plain)
    distill_stream.check_row(row, wanted)
    with pytest.raises(UserError, match="a student learns one of them"):
        distill_stream.check_row(row, replace(wanted, sampled=given))


def _matches_distributions(teacher: Storage, start: Path, out: Path) -> None:
    """From a student's weights, with the teacher's guidance."""
    from safetensors.numpy import load_file

    asked: dict[str, Any] = {"method": "distribution", "num_inference_steps": 2, "steps": 2}
    job = prepare(teacher, "v1", settings(**asked, start=str(start)), out)
    assert (job.num_inference_steps, job.places, job.start_path) == (2, None, str(start))
    sample = next(stored.read_samples(teacher, "v1"))
    negative = read([sample], job.wanted)["negative_embeds"][0]
    assert np.array_equal(negative, padded(sample.negative_text()["prompt_embeds"], job.text_length))
    assert not np.array_equal(negative, read([sample], job.wanted)["prompt_embeds"][0])
    with pytest.raises(UserError, match=r"^--out .*start_sha256 was"):
        prepare(teacher, "v1", settings(**asked), out)
    with pytest.raises(UserError, match=r"^start: "):
        prepare(teacher, "v1", settings(**asked, start=str(out / "nowhere")), out)
    moved = out.parent / "moved"
    shutil.copytree(start, moved)
    assert prepare(teacher, "v1", settings(**asked, start=str(moved)), out).start_path == str(moved)  # the same weights
    config = moved / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"ffn_dim": ', '"ffn_dim": 1'))
    with pytest.raises(UserError, match=r"^start: .*differ in ffn_dim of the transformer"):
        prepare(teacher, "v1", settings(**asked, start=str(moved)), out.parent / "wide")
    assert train(prepare(teacher, "v1", settings(**asked, start=str(start)), out), out, 60.0) == 2
    before, after = (load_file(folder / "weights" / "average.safetensors") for folder in (start, out))
    assert any((before[name] != value).any() for name, value in after.items())
    assert max(abs(before[name] - value).max() for name, value in after.items()) < 0.05  # and not the teacher's, moved


def test_prompts_are_all_that_matching_distributions_needs(
    generate_from: Callable[..., Path], tiny_pack: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    made = Storage(
        str(
            generate_from(
                recipe="prompts",
                judge={"backend": "none"},
                caption=None,
                output={"keep_rejected": "none"},
                sampler={"num_inference_steps": 4, "guidance_scale": 3.0},
            )
        )
    )
    release.release(made, "v1")
    asked: dict[str, Any] = {"method": "distribution", "num_inference_steps": 2, "steps": 1}
    job = prepare(made, "v1", settings(**asked), tmp_path / "student")
    assert job.latent_shape == made_up.SHAPE == latent_shape(str(tiny_pack / "generator"), 32, 32, 5)
    batch = read(list(stored.read_samples(made, "v1"))[:2], job.wanted)
    assert batch["latents"].shape == (2, *made_up.SHAPE) and not batch["noise"].any()
    assert train(job, tmp_path / "student", 60.0) == 1
    assert publish(job, tmp_path / "student", 1) is None  # nothing to compare with
    with pytest.raises(UserError, match=r"latents are not stored|has no latents"):
        prepare(made, "v1", settings(method="reflow"), tmp_path / "other")
    tall = {**next(stored.read_samples(made, "v1")).row, "height": 64}
    with pytest.raises(UserError, match="is of 64x32x5, others of 32x32x5"):
        distill_stream.check_row(tall, job.wanted)


def test_ends_of_a_path_need_not_be_kept() -> None:
    sample = next(made_up.samples("t", kept=(2,)))
    ends = {"noise": sample.noise(), "latents": sample.latents()}
    found = states(sample.trajectory(), ends, Wanted("t", 3.0, 3.0, 8, (0, 2, 4), made_up.STEPS))
    assert np.array_equal(found[0], sample.noise())
    assert np.array_equal(found[1], sample.noise() * 0.75)
    assert np.array_equal(found[2], sample.latents())


def test_embeddings_are_padded_with_zeros_or_cut() -> None:
    embeds = np.ones((3, 2), np.float32)
    assert padded(embeds, 4).tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    assert padded(embeds, 2).shape == (2, 2)


def test_settings_name_the_key_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("method: trajectory\noptimizer: {learning_rate: 0.01}\n")
    found = load_settings(str(file), ["optimizer.clip=2", "deepspeed.zero=3"], steps=7)
    assert (found.optimizer.learning_rate, found.optimizer.clip, found.deepspeed.zero, found.steps) == (0.01, 2, 3, 7)
    for overrides, key in (
        (["deepspeed.zero=4"], "deepspeed.zero"),
        (["optimiser.lr=1"], "optimiser"),
        (["optimizer.betas=[0.9, 1]"], "optimizer.betas.1"),
        ([], "method"),
    ):
        with pytest.raises(UserError, match=f"^{key}: "):
            load_settings(None, overrides, method="reflow" if overrides else None)


def test_identity_leaves_out_what_changes_no_weights() -> None:
    assert settings().identity() == settings(log_steps=9, evaluate={"samples": 1}).identity()
    assert settings().identity() != settings(seed=1).identity()


def test_intervals_are_wilsons() -> None:
    found = share([True] * 90 + [False] * 10)
    assert (found["low"], found["high"]) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert share([]) == {"share": 0.0, "low": 0.0, "high": 1.0, "asked": 0}


def test_a_job_is_read_as_it_was_written(storage: Storage, tmp_path: Path) -> None:
    job = prepare(storage, "v1", settings(), tmp_path / "student")
    assert Job.read(tmp_path / "student") == replace(job, settings=json.loads(json.dumps(job.settings)))
    assert SimpleNamespace(**job.storage).root == storage.root
