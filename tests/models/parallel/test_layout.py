"""A generator over ranks samples what one process samples, through its pipeline's own call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from infra.errors import UserError
from models.families import family_of
from models.generator import Generator, GeneratorRef
from models.noise import noise_key, standard_normal
from models.parallel.degrees import Degrees, check_layout
from models.plan import SamplerPlan
from tests.models.parallel.ranks import on_ranks

PLAN = SamplerPlan(num_inference_steps=3, guidance_scale=3.0, max_sequence_length=16)
VIDEO = (32, 32, 9)


def _latents(
    ref: GeneratorRef, plan: SamplerPlan = PLAN, video: tuple[int, int, int] = VIDEO
) -> tuple[np.ndarray, int]:
    generator = Generator(ref)
    shape = generator.latent_shape(*video)
    noise = np.stack([standard_normal(noise_key(0, name, 0), shape) for name in "ab"])
    conditions = generator.encode(["a cat", "two dogs"], ["", "blurred"], [], plan)
    return generator.sample(conditions, noise, plan, *video, 8.0)


@pytest.mark.parametrize(
    "degrees",
    [Degrees(cfg=2), Degrees(ulysses=2), Degrees(ring=2), Degrees(tensor=2), Degrees(cfg=2, ulysses=2)],
    ids=str,
)
def test_a_generator_over_ranks_samples_what_one_process_does(
    degrees: Degrees, tiny_checkpoint: Callable[[str], str]
) -> None:
    path = tiny_checkpoint("WanPipeline")
    wanted, evaluations = _latents(GeneratorRef(path))
    for made, counted in on_ranks(degrees.size, _latents, GeneratorRef(path, parallel=degrees)):
        assert counted == evaluations
        assert np.abs(made - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_long_video_is_sampled_in_blocks_the_same_by_one_stage_and_by_two(
    tiny_checkpoint: Callable[[str], str],
) -> None:
    path, plan = tiny_checkpoint("WanPipeline"), replace(PLAN, blocks=(2, 1))
    wanted, evaluations = _latents(GeneratorRef(path), plan, (32, 32, 25))
    assert wanted.shape[2] == 7 and evaluations == 6 and np.abs(wanted[:, :, 4:]).min() > 0
    first, second = on_ranks(2, _latents, GeneratorRef(path, parallel=Degrees(dualparal=2)), plan, (32, 32, 25))
    assert np.array_equal(first[0], wanted) and not second[0].any()
    with pytest.raises(UserError, match="25 are"):
        _latents(GeneratorRef(path), plan, (32, 32, 21))


def test_a_sample_in_blocks_has_the_same_bits_in_any_batch(tiny_checkpoint: Callable[[str], str]) -> None:
    generator, plan, video = (
        Generator(GeneratorRef(tiny_checkpoint("WanPipeline"))),
        replace(PLAN, blocks=(2, 1)),
        (32, 32, 25),
    )
    shape = generator.latent_shape(*video)
    noise = np.stack([standard_normal(noise_key(0, name, 0), shape) for name in "ab"])
    conditions = generator.encode(["a cat", "two dogs"], ["", ""], [], plan)
    both, _ = generator.sample(conditions, noise, plan, *video, 8.0)
    turned = {name: value[::-1] for name, value in conditions.items()}
    again, _ = generator.sample(turned, noise[::-1], plan, *video, 8.0)
    assert np.array_equal(both, again[::-1])


def test_a_family_without_a_layout_says_so() -> None:
    with pytest.raises(UserError, match=r"layout\.parallel\.ring: FLUX\.1 has no such layout, found 2"):
        check_layout("", family_of("FluxPipeline"), Degrees(ring=2), guided=True)


def test_a_checkpoint_is_asked_for_its_heads(tiny_checkpoint: Callable[[str], str]) -> None:
    family = family_of("WanPipeline")
    check_layout(tiny_checkpoint("WanPipeline"), family, Degrees(tensor=2), guided=True)
    with pytest.raises(UserError, match=r"layout\.parallel\.tensor: . heads cannot be shared by 7 ranks"):
        check_layout(tiny_checkpoint("WanPipeline"), family, Degrees(tensor=7), guided=True)
    with pytest.raises(UserError, match=r"layout\.parallel\.dualparal: 2 stages want sampler\.dualparal"):
        check_layout(tiny_checkpoint("WanPipeline"), family, Degrees(dualparal=2), guided=True)
    with pytest.raises(UserError, match="not with ring"):
        check_layout(tiny_checkpoint("WanPipeline"), family, Degrees(ring=2), guided=True, blocks=(2, 1))
    with pytest.raises(UserError, match=r"layout\.parallel\.cfg: 2 branches want guidance_scale above 1"):
        check_layout(tiny_checkpoint("WanPipeline"), family, Degrees(cfg=2), guided=False)


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        (Degrees(cfg=3), "two branches, found 3"),
        (Degrees(tensor=3), "4 heads cannot be shared by 3 ranks"),
        (Degrees(ulysses=8), "8 ranks for 4 heads"),
        (Degrees(dualparal=9), "9 stages for 6 layers"),
        (Degrees(ulysses=4, vae=3), "one rank decodes or all of the group do, found 3 of 4; use 1 or 4"),
    ],
)
def test_degrees_that_do_not_fit_name_the_numbers(degrees: Degrees, said: str) -> None:
    with pytest.raises(UserError, match=said):
        degrees.check(heads=4, layers=6, guided=True)


def test_a_video_in_scenes_is_the_same_by_one_stage_and_by_two(tiny_checkpoint: Callable[[str], str]) -> None:
    path = tiny_checkpoint("WanPipeline")
    in_blocks = replace(PLAN, blocks=(2, 1))
    plain, _ = _latents(GeneratorRef(path), in_blocks, (32, 32, 25))
    unsaid, _ = _latents(GeneratorRef(path), replace(in_blocks, scenes=("||", 2.0)), (32, 32, 25))
    assert np.abs(unsaid - plain).max() <= 1e-5 * np.abs(plain).max()
    scenes = replace(in_blocks, scenes=(" ", 2.0))  # each word is a scene
    wanted, _ = _latents(GeneratorRef(path), scenes, (32, 32, 25))
    assert np.abs(wanted - plain).max() > 1e-3 * np.abs(plain).max()
    first, _ = on_ranks(2, _latents, GeneratorRef(path, parallel=Degrees(dualparal=2)), scenes, (32, 32, 25))
    assert np.array_equal(first[0], wanted)
