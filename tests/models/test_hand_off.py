"""A teacher that takes the first steps of its student: who answers when, what it costs, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from models.generator import Generator, GeneratorRef
from models.hand_off import check_hand_off, check_plan, check_runs_whole
from models.loading import TeacherRef
from models.noise import noise_key, standard_normal
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan
from models.schedulers import build_scheduler

VIDEO = (64, 64, 9)
STEPS = 4
PLAN = SamplerPlan(num_inference_steps=STEPS, guidance_scale=1.0, max_sequence_length=16)
GUIDED = replace(PLAN, guidance_scale=3.0)
PROMPTS = ["a cat", "a red dog that runs"]


@pytest.fixture(scope="session")
def teacher(tiny_pack: Path) -> str:
    return str(tiny_pack / "generator")


@pytest.fixture(scope="session")
def student(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher's checkpoint with another denoiser."""
    from diffusers import WanTransformer3DModel

    from models.pack.tiny import fill_weights

    folder = Path(shutil.copytree(teacher, tmp_path_factory.mktemp("student") / "wan"))
    denoiser = WanTransformer3DModel.from_pretrained(folder / "transformer")
    fill_weights(denoiser, "student")
    denoiser.save_pretrained(folder / "transformer")
    return str(folder)


@pytest.fixture
def copy(student: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student, tmp_path / "copy"))


def handed(student: str, teacher: str, steps: int, guidance_scale: float = 3.0) -> Generator:
    ref = TeacherRef(teacher, "the-teacher", "ab" * 32, steps, guidance_scale)
    return Generator(GeneratorRef(student, teacher=ref))


def sampled(generator: Generator, plan: SamplerPlan = PLAN, rows: list[int] | None = None) -> tuple[np.ndarray, int]:
    """Latents of PROMPTS, `rows` of them, and evaluations for each."""
    shape = generator.latent_shape(*VIDEO)
    noise = np.stack([standard_normal(noise_key(0, prompt, 0), shape) for prompt in PROMPTS])
    conditions = generator.encode(PROMPTS, ["", "blurry"], [], plan)
    rows = [0, 1] if rows is None else rows
    return generator.sample({name: value[rows] for name, value in conditions.items()}, noise[rows], plan, *VIDEO, 8.0)


def test_a_teacher_of_all_steps_makes_what_it_makes_alone(student: str, teacher: str) -> None:
    alone, nfe = sampled(Generator(GeneratorRef(teacher)), GUIDED)
    with_student, handed_nfe = sampled(handed(student, teacher, STEPS))
    np.testing.assert_array_equal(with_student, alone)
    assert handed_nfe == nfe == 2 * STEPS


def test_a_teacher_without_guidance_makes_what_it_makes_alone(student: str, teacher: str) -> None:
    alone, nfe = sampled(Generator(GeneratorRef(teacher)), PLAN)
    with_student, handed_nfe = sampled(handed(student, teacher, STEPS, 1.0))
    np.testing.assert_array_equal(with_student, alone)
    assert handed_nfe == nfe == STEPS


def test_a_teacher_of_no_step_leaves_the_student_as_it_is(student: str, teacher: str) -> None:
    alone, nfe = sampled(Generator(GeneratorRef(student)), PLAN)
    with_teacher, handed_nfe = sampled(handed(student, teacher, 0))
    np.testing.assert_array_equal(with_teacher, alone)
    assert handed_nfe == nfe == STEPS


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scheduler", ["default", "euler"])
def test_a_teacher_of_some_steps_is_the_hand_written_loop(
    steps: int, scheduler: str, student: str, teacher: str
) -> None:
    plan = replace(PLAN, scheduler=scheduler)
    generator = handed(student, teacher, steps)
    made, nfe = sampled(generator, plan)
    np.testing.assert_array_equal(made, _by_hand(generator, student, teacher, plan, steps))
    assert nfe == 2 * steps + STEPS - steps
    for other in (GeneratorRef(student), GeneratorRef(teacher)):
        assert np.abs(made - sampled(Generator(other), plan)[0]).max() > 1e-3


def _by_hand(generator: Generator, student: str, teacher: str, plan: SamplerPlan, steps: int) -> np.ndarray:
    import torch
    from diffusers import WanTransformer3DModel

    ours, theirs = (WanTransformer3DModel.from_pretrained(Path(at, "transformer")) for at in (student, teacher))
    conditions = generator.encode(PROMPTS, ["", "blurry"], [], GUIDED)
    prompted, negative = (torch.from_numpy(conditions[name]) for name in ("prompt_embeds", "negative_prompt_embeds"))
    scheduler = build_scheduler(generator._schedulers["sample"], plan)
    scheduler.set_timesteps(STEPS)
    shape = generator.latent_shape(*VIDEO)
    latents = torch.from_numpy(np.stack([standard_normal(noise_key(0, prompt, 0), shape) for prompt in PROMPTS]))
    with torch.inference_mode():
        for at, timestep in enumerate(scheduler.timesteps):
            model = theirs if at < steps else ours
            each = timestep.expand(len(latents))
            velocity = model(latents, each, prompted, return_dict=False)[0]
            if at < steps:
                unprompted = model(latents, each, negative, return_dict=False)[0]
                velocity = unprompted + 3.0 * (velocity - unprompted)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.numpy()


def test_a_sample_has_the_same_bits_in_any_slot_and_the_next_time(student: str, teacher: str) -> None:
    generator = handed(student, teacher, 1)
    first, _ = sampled(generator)
    np.testing.assert_array_equal(sampled(generator)[0], first)
    np.testing.assert_array_equal(sampled(generator, rows=[1, 0])[0], first[::-1])
    np.testing.assert_array_equal(sampled(generator, rows=[1, 1])[0], first[[1, 1]])  # as a batch is padded
    np.testing.assert_array_equal(sampled(handed(student, teacher, 1))[0], first)


def test_the_pipeline_has_its_own_denoiser_again_also_after_an_error(
    student: str, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = handed(student, teacher, 1)
    generator.load("sample")
    pipe = generator._pipes["sample"]
    before, index = pipe.transformer, dict(pipe.config)

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(before, "forward", fails)
    with pytest.raises(MemoryError):
        sampled(generator)
    assert pipe.transformer is before and dict(pipe.config) == index


def test_a_row_says_who_took_the_first_steps(student: str, teacher: str) -> None:
    facts = handed(student, teacher, 1).describe(PLAN, *VIDEO)
    assert facts["guidance_scale"] == 1.0
    assert facts["teacher"] == {"model": "the-teacher", "sha256": "ab" * 32, "steps": 1, "guidance_scale": 3.0}
    assert "teacher" not in Generator(GeneratorRef(student)).describe(PLAN, *VIDEO)
    assert teacher not in json.dumps(facts)


def ref_of(folder: str) -> TeacherRef:
    return TeacherRef(folder, "the-teacher", "", 1, 3.0)


def test_a_student_and_its_teacher_fit(student: str, teacher: str) -> None:
    check_hand_off(student, ref_of(teacher))
    check_plan(PLAN, ref_of(teacher))
    check_runs_whole(GeneratorRef(student))


def test_a_default_that_an_older_checkpoint_leaves_out_is_no_difference(copy: Path, teacher: str) -> None:
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "scale_factor" not in k}))
    assert "scale_factor_spatial" in config
    check_hand_off(str(copy), ref_of(teacher))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"in_channels": 36}, "differ in in_channels of the transformer"),
        ("vae/config.json", {"latents_std": [2.0] * 16}, "differ in latents_std of the vae"),
        ("text_encoder/config.json", {"d_ff": 48}, "has another text_encoder than its student"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 99}, "has another tokenizer than its student"),
        ("model_index.json", {"boundary_ratio": 0.9}, "two experts"),
        ("model_index.json", {"expand_timesteps": True}, "differ in expand_timesteps"),
        ("model_index.json", {"_class_name": "LTXPipeline"}, "is a LTXPipeline, and only a WanPipeline"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher_is_refused(
    file: str, changes: dict[str, Any], words: str, copy: Path, teacher: str
) -> None:
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words) as error:
        check_hand_off(str(copy), ref_of(teacher))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"blocks": (4, 2)}, "sampler.dualparal: "),
        ({"guidance_scale": 1.75}, "sampler.guidance_scale: "),
        ({"num_inference_steps": 1}, "generators.teacher_steps: found 2"),
    ],
)
def test_a_plan_that_two_models_cannot_share_is_refused(changes: dict[str, Any], key: str, teacher: str) -> None:
    with pytest.raises(UserError, match=f"^{key}"):
        check_plan(replace(PLAN, **changes), replace(ref_of(teacher), steps=2))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"parallel": Degrees(cfg=2)}, "layout.parallel"),
        ({"attention": "flash"}, "layout.attention"),
        ({"offload": "model"}, "layout.offload"),
        ({"remote_code": "somebody/pipeline", "revision": "abc"}, "generators.remote_code"),
    ],
)
def test_a_layout_that_the_teacher_has_not_is_refused(changes: dict[str, Any], key: str, student: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: "):
        check_runs_whole(GeneratorRef(student, **changes))
