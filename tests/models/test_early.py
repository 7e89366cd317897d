"""Batches that go on without some of their rows: what is left comes out as it would have, whatever the family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import UserError
from models.early import Early, check_early, check_look, look_step, smaller
from models.estimate import clean_estimate, noise_levels
from models.families import FAMILIES, Family, family_of
from models.generator import Generator, GeneratorRef
from models.loading import GeneratorRef as Ref
from models.loading import TeacherRef
from models.noise import noise_key, standard_normal
from models.parallel.degrees import Degrees
from models.path import Path as States
from models.plan import SamplerPlan

PLAN = SamplerPlan(num_inference_steps=4, guidance_scale=3.0, max_sequence_length=16)
PROMPTS = ["a cat", "a red dog that runs", "two boats", "the sea at night"]
SCORES = np.array([0.1, 0.9, 0.2, 0.8])
GOES_ON = [1, 3]


def looked_at(below: float = 0.5, frames: int = 2, **changes: Any) -> tuple[Early, list[np.ndarray]]:
    """What stops each of PROMPTS that scores less, and the clips that it is shown."""
    shown: list[np.ndarray] = []

    def look(clips: np.ndarray, start: int) -> np.ndarray:
        shown.append(clips)
        return SCORES[start : start + len(clips)]

    said: dict[str, Any] = {"at": 0.97, "below": np.full(4, below), "spared": np.zeros(4, bool)} | changes
    return Early(frames=frames, look=look, **said), shown


def given(generator: Generator, shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    images = [np.full((*shape[:2], 3), 60 * at, np.uint8) for at in range(4)] if generator.family.inputs else []  # type: ignore[union-attr]
    noise = [standard_normal(noise_key(0, prompt, 0), generator.latent_shape(*shape)) for prompt in PROMPTS]
    return generator.encode(PROMPTS, [""] * 4, images, PLAN), np.stack(noise)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline)
def test_what_is_not_stopped_comes_out_as_it_would_have(family: Family, tiny_checkpoint: Callable[[str], str]) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint(family.pipeline)))
    shape = (32, 32, 9 if family.media == "video" else 1)
    conditions, noise = given(generator, shape)
    whole, evaluations = generator.sample(conditions, noise, PLAN, *shape, 8.0)
    early, shown = looked_at()
    part, again = generator.sample(conditions, noise, PLAN, *shape, 8.0, early=early)
    np.testing.assert_allclose(part[GOES_ON], whole[GOES_ON], atol=1e-4, rtol=0)
    assert early.stopped.tolist() == [True, False, True, False]
    assert again == evaluations
    assert early.evaluations.tolist() == [evaluations // 2, 0, evaluations // 2, 0]
    assert early.sizes.tolist() == ([0, 2, 0, 2] if family.batches else [0] * 4)
    assert sum(map(len, shown)) == 4
    assert shown[0].shape[1] < shape[2] or family.media == "image"


@pytest.fixture
def wan(tiny_checkpoint: Callable[[str], str]) -> Generator:
    return Generator(GeneratorRef(tiny_checkpoint("WanPipeline")))


VIDEO = (32, 32, 9)


def test_a_look_that_stops_nothing_changes_no_bit(wan: Generator) -> None:
    conditions, noise = given(wan, VIDEO)
    whole, _ = wan.sample(conditions, noise, PLAN, *VIDEO, 8.0)
    for early, _ in (looked_at(-math.inf), looked_at(2.0, spared=np.ones(4, bool))):
        np.testing.assert_array_equal(wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, early=early)[0], whole)
        assert not early.stopped.any()
        assert early.scores.tolist() == SCORES.tolist()


def test_the_denoiser_is_asked_for_fewer_rows_after_the_look(wan: Generator) -> None:
    conditions, noise = given(wan, VIDEO)
    seen: list[int] = []
    blocks = wan._pipe("sample").transformer.blocks
    handle = blocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    early, _ = looked_at()
    wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, early=early)
    assert seen == [4] * 2 * early.step + [2] * 2 * (4 - early.step)
    seen.clear()
    wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, early=looked_at(2.0)[0])
    handle.remove()
    assert seen == [4] * 2 * early.step


def test_what_was_padded_is_neither_looked_at_nor_kept(wan: Generator) -> None:
    conditions, noise = given(wan, VIDEO)
    early, shown = looked_at(spared=np.zeros(3, bool))
    early.below = early.below[:3]
    part, _ = wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, early=early)
    whole, _ = wan.sample(conditions, noise, PLAN, *VIDEO, 8.0)
    assert len(shown[0]) == 3
    assert early.sizes.tolist() == [0, 1, 0]
    np.testing.assert_allclose(part[1], whole[1], atol=1e-4, rtol=0)


def test_the_clips_are_what_the_estimate_decodes_to(wan: Generator) -> None:
    """Of a plan's last but one step, whose estimate is close to the end, and of all frames."""
    conditions, noise = given(wan, VIDEO)
    plan = replace(PLAN, num_inference_steps=12, scheduler="euler")
    latents, _ = wan.sample(conditions, noise, plan, *VIDEO, 8.0)
    early, shown = looked_at(-math.inf, frames=99, at=0.3)
    wan.sample(conditions, noise, plan, *VIDEO, 8.0, early=early)
    assert early.step == 11
    decoded = wan.decode(latents, *VIDEO).astype(int)
    assert shown[0].shape == decoded.shape
    near = np.abs(shown[0] - decoded).mean()
    assert near < np.abs(shown[0][::-1] - decoded).mean() / 2


def test_first_frames_are_those_of_the_whole(wan: Generator) -> None:
    conditions, noise = given(wan, VIDEO)
    early, few = looked_at(-math.inf, frames=2)
    wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, early=early)
    early, all_of_them = looked_at(-math.inf, frames=3)
    wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, early=early)
    np.testing.assert_array_equal(few[0], all_of_them[0][:, :5])


def test_states_of_a_path_are_those_of_the_whole_for_what_goes_on(wan: Generator) -> None:
    conditions, noise = given(wan, VIDEO)
    whole, part = States((0, 2, 4), 4), States((0, 2, 4), 4)
    wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, whole)
    wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, part, None, looked_at()[0])
    assert part.states.shape == whole.states.shape
    np.testing.assert_allclose(part.states[GOES_ON], whole.states[GOES_ON], atol=1e-4, rtol=0)


def test_a_student_takes_over_a_batch_of_which_its_teacher_lost_some(wan: Generator) -> None:
    """It is asked for the first time after the look."""
    teacher = TeacherRef(wan.ref.path, "teacher", "0" * 64, steps=2, guidance_scale=3.0)
    handed = Generator(replace(wan.ref, teacher=teacher))
    conditions, noise = given(wan, VIDEO)
    plan = replace(PLAN, guidance_scale=1.0)
    whole, _ = handed.sample(conditions, noise, plan, *VIDEO, 8.0)
    part, _ = handed.sample(conditions, noise, plan, *VIDEO, 8.0, early=(early := looked_at()[0]))
    assert early.evaluations.tolist() == [4, 0, 4, 0]
    np.testing.assert_allclose(part[GOES_ON], whole[GOES_ON], atol=1e-4, rtol=0)
    none, _ = handed.sample(conditions, noise, plan, *VIDEO, 8.0, early=looked_at(2.0)[0])
    assert none.shape == whole.shape


def test_a_generator_is_as_before_after_a_look(wan: Generator) -> None:
    conditions, noise = given(wan, VIDEO)
    before, _ = wan.sample(conditions, noise, PLAN, *VIDEO, 8.0)
    wan.sample(conditions, noise, PLAN, *VIDEO, 8.0, early=looked_at(2.0)[0])
    np.testing.assert_array_equal(wan.sample(conditions, noise, PLAN, *VIDEO, 8.0)[0], before)


@pytest.mark.parametrize("scheduler", ["unipc", "dpmpp", "euler"])
def test_the_estimate_of_a_straight_flow_is_its_end(scheduler: str, wan: Generator) -> None:
    """Where the velocity is noise less clean latents, as it is on a straight path, every step's estimate is exact."""
    made = wan._scheduler(replace(PLAN, scheduler=scheduler))
    made.set_timesteps(4)
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for step, level in enumerate(noise_levels(made)):
        state = (1 - level) * clean + level * noise
        torch.testing.assert_close(clean_estimate(made, step, noise - clean, state), clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"]
)
def test_the_estimate_is_the_clean_latent_of_diffusion_too(name: str, kind: str) -> None:
    import diffusers

    made = getattr(diffusers, name)(prediction_type=kind, beta_schedule="scaled_linear", beta_end=0.012)
    made.set_timesteps(6)
    clean, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    for step, level in enumerate(noise_levels(made)):
        alpha = math.sqrt(1 - level**2)
        state = alpha * clean + level * noise
        said = {"epsilon": noise, "v_prediction": alpha * noise - level * clean, "sample": clean}[kind]
        state = state / alpha if name == "EulerDiscreteScheduler" else state
        torch.testing.assert_close(clean_estimate(made, step, said, state).double(), clean, atol=1e-3, rtol=0)


def test_a_batch_goes_on_at_the_next_of_its_eighths() -> None:
    assert [smaller(count, 16) for count in (0, 1, 2, 3, 10, 15, 16)] == [0, 2, 2, 4, 10, 16, 16]
    assert [smaller(count, 4) for count in range(5)] == [0, 1, 2, 3, 4]
    assert len({smaller(count, 100) for count in range(1, 101)}) <= 8


def test_the_look_is_at_the_first_step_at_or_below_the_level(wan: Generator) -> None:
    made = wan._scheduler(replace(PLAN, num_inference_steps=20, shift=3.0))
    made.set_timesteps(20)
    levels = noise_levels(made)
    step = look_step(made, 0.7)
    assert levels[step] <= 0.7 < levels[step - 1]
    with pytest.raises(UserError, match=r"sampler\.early_reject\.at: none of the 20 steps but the last"):
        look_step(made, 0.01)


@pytest.mark.parametrize(
    ("changes", "plan", "said"),
    [
        ({"parallel": Degrees(ulysses=2)}, PLAN, "not with layout.parallel"),
        ({"compile": True}, PLAN, "not with layout.compile"),
        ({"offload": "model"}, PLAN, "not with layout.offload"),
        ({}, replace(PLAN, blocks=(8, 4)), "not with sampler.dualparal"),
    ],
)
def test_what_does_not_compose_is_refused_with_a_reason(changes: dict[str, Any], plan: SamplerPlan, said: str) -> None:
    check_early(family_of("WanPipeline"), Ref("folder"), PLAN)
    with pytest.raises(UserError, match=f"^sampler.early_reject: {said}, for .*; remove one of the two$"):
        check_early(family_of("WanPipeline"), Ref("folder", **changes), plan)


def test_a_pipeline_that_runs_whole_is_refused() -> None:
    with pytest.raises(UserError, match="runs whole"):
        check_early(None, Ref("folder"), PLAN)


def test_a_scheduler_of_two_turns_a_step_is_refused() -> None:
    from diffusers import HeunDiscreteScheduler

    with pytest.raises(UserError, match="takes 2 turns a step"):
        check_look(HeunDiscreteScheduler(), PLAN, 0.5, False)
