from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from infra.errors import UserError
from models.families import FAMILIES, family_of
from models.generator import Generator, GeneratorRef
from models.noise import noise_key, standard_normal
from models.path import Path, places_of
from models.plan import SamplerPlan

Checkpoint = Callable[[str], str]
PLAN = SamplerPlan(num_inference_steps=3, guidance_scale=3.0, max_sequence_length=16)


@pytest.mark.parametrize(
    ("keep", "convention", "steps", "places"),
    [
        ([0, 12, 24, 36, -1], "before", 48, (0, 12, 24, 36, 48)),  # Self-Forcing: 49 states
        ([0, 36, 44, -1], "before", 50, (0, 36, 44, 50)),  # CausVid: 51 states
        ([0, 12, 24, 36, -1], "after", 48, (1, 13, 25, 37, 48)),  # FastVideo: 48 states, one later
        ([-1, 0], "before", 4, (0, 4)),
        ("all", "before", 3, (0, 1, 2, 3)),
        ("all", "after", 3, (1, 2, 3)),
    ],
)
def test_places_are_named_before_the_step(keep, convention, steps, places):
    assert places_of(keep, convention, steps) == places


@pytest.mark.parametrize(
    ("keep", "convention", "said"),
    [
        ([49], "before", "from -49 to 48, the 49 of 48 steps that are named before the step, found 49"),
        ([48], "after", "from -48 to 47, the 48 of 48 steps that are named after the step, found 48"),
        ([-50], "before", "found -50"),
        ([48, -1], "before", "expected each state once, found 48 and -1"),
        ([], "before", "found none"),
    ],
)
def test_places_that_are_not_there_are_refused(keep, convention, said):
    with pytest.raises(ValueError, match=said):
        places_of(keep, convention, 48)


def inputs(generator: Generator, shape: tuple[int, int, int], count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    noise = np.stack([standard_normal(noise_key(0, str(at), 0), generator.latent_shape(*shape)) for at in range(count)])
    wanted = generator.family is not None and generator.family.inputs
    images = [np.full((*shape[:2], 3), 90, np.uint8)] * count if wanted else []
    return generator.encode(["a cat", "two dogs"][:count], [""] * count, images, PLAN), noise


@pytest.mark.parametrize("pipeline", [family.pipeline for family in FAMILIES])
def test_every_family_gives_the_states_of_its_path(pipeline: str, tiny_checkpoint: Checkpoint) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint(pipeline)))
    family = family_of(pipeline)
    assert family is not None
    shape = (32, 32, 9 if family.media == "video" else 1)
    conditions, noise = inputs(generator, shape, 2)
    plain, _ = generator.sample(conditions, noise, PLAN, *shape, 8.0)
    path = Path((0, 1, 3), 3)
    latents, _ = generator.sample(conditions, noise, PLAN, *shape, 8.0, path)
    np.testing.assert_array_equal(latents, plain)
    assert path.states.shape == (2, 3, *noise.shape[1:])
    np.testing.assert_array_equal(path.states[:, -1], latents)
    scale = np.float32(path.states[0, 0].ravel()[0] / noise[0].ravel()[0])
    np.testing.assert_allclose(path.states[:, 0], noise * scale, rtol=1e-6)
    if generator.describe(PLAN, *shape)["flow"]:
        np.testing.assert_array_equal(path.states[:, 0], noise)
    assert np.abs(path.states[:, 1] - path.states[:, 0]).max() > 0


@pytest.mark.parametrize("scheduler", ["euler", "euler_trailing"])
def test_a_step_of_euler_leads_from_state_to_state(scheduler: str, tiny_checkpoint: Checkpoint) -> None:
    """x_{k+1} = x_k + (sigma_{k+1} - sigma_k) v: the same velocity from two states of one straight step."""
    generator = Generator(GeneratorRef(tiny_checkpoint("WanPipeline")))
    plan = SamplerPlan(
        scheduler=scheduler, num_inference_steps=3, guidance_scale=1.0, shift=5.0, max_sequence_length=16
    )
    conditions, noise = inputs(generator, (32, 32, 9), 1)
    conditions = {"prompt_embeds": conditions["prompt_embeds"]}
    path = Path((0, 1, 2, 3), 3)
    generator.sample(conditions, noise, plan, 32, 32, 9, 8.0, path)
    said = generator.describe(plan, 32, 32, 9)
    import torch

    denoiser = generator._pipe("sample").transformer
    for step in range(3):
        state = torch.from_numpy(path.states[:, step])
        with torch.inference_mode():
            embeds = torch.from_numpy(conditions["prompt_embeds"])
            velocity = denoiser(state, torch.tensor([said["timesteps"][step]]), embeds, return_dict=False)[0]
        moved = state + (said["sigmas"][step + 1] - said["sigmas"][step]) * velocity
        np.testing.assert_allclose(path.states[:, step + 1], moved.numpy(), atol=1e-5)


def test_a_shortened_plan_fills_the_places_that_it_does_not_reach(tiny_checkpoint: Checkpoint) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint("WanPipeline")))
    conditions, noise = inputs(generator, (32, 32, 9), 1)
    path = Path((0, 36, 48), 3)
    latents, _ = generator.sample(conditions, noise, PLAN, 32, 32, 9, 8.0, path)
    np.testing.assert_array_equal(path.states[:, 1:], np.stack([latents, latents], axis=1))


def test_a_scheduler_of_two_turns_a_step_is_refused(tiny_checkpoint: Checkpoint) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    generator = Generator(GeneratorRef(tiny_checkpoint("StableDiffusion3Pipeline")))
    generator.load("sample")
    generator._schedulers["sample"] = FlowMatchHeunDiscreteScheduler()
    generator.check_plan(PLAN)
    with pytest.raises(UserError, match=r"^sampler\.scheduler: FlowMatchHeunDiscreteScheduler takes 2 turns"):
        generator.check_plan(PLAN, with_path=True)
