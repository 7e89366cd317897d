"""DualParal: the same bits for any number of stages, and the plain sampler where one block covers the video."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from models.parallel.attention import Split
from models.parallel.degrees import Degrees, build_mesh
from models.parallel.dualparal import Blocks, DualParal, noise_of
from tests.models.parallel.ranks import on_ranks
from tests.models.parallel.test_sequence import tiny_wan

STEPS = 3
BLOCKS = Blocks(count=4, frames=2, context=1)


def _scheduler() -> Any:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(STEPS)
    return scheduler


def _text(block: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.randn(2, 2, 7, 16, generator=torch.Generator().manual_seed(min(block, 1)))
    return embeds[0], embeds[1]


def _noise(blocks: Blocks) -> torch.Tensor:
    return torch.randn(2, 4, blocks.frames + blocks.context, 4, 6, generator=torch.Generator().manual_seed(3))


def _sample(degrees: Degrees, blocks: Blocks, guidance_scale: float = 4.0) -> list[torch.Tensor]:
    groups: dict[str, Any] = {}
    if degrees.size > 1:
        mesh = build_mesh(degrees)
        groups = {
            "stages": mesh["dualparal"].get_group(),
            "branches": mesh["cfg"].get_group() if degrees.cfg > 1 else None,
            "split": Split(ulysses=mesh["ulysses"].get_group()),
        }
    transformer = tiny_wan(layers=4)
    sampler = DualParal(transformer, _scheduler, steps=STEPS, guidance_scale=guidance_scale, **groups)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return [latents for _, latents in sampler.sample(_noise(blocks), blocks, _text, generators)]


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return torch.cat(_sample(Degrees(), BLOCKS), dim=2)


@pytest.mark.parametrize("stages", [2, 4])
def test_latents_are_the_same_bits_for_any_number_of_stages(stages: int, alone: torch.Tensor):
    first, *others = on_ranks(stages, _sample, Degrees(dualparal=stages), BLOCKS)
    assert alone.shape == (2, 4, BLOCKS.total, 4, 6)
    assert torch.equal(torch.cat(first, dim=2), alone)
    assert not any(others)


@pytest.mark.parametrize("degrees", [Degrees(dualparal=2, cfg=2), Degrees(dualparal=2, ulysses=2)], ids=str)
def test_it_composes_with_guidance_parallel_and_ulysses(degrees: Degrees, alone: torch.Tensor):
    found = [torch.cat(parts, dim=2) for parts in on_ranks(4, _sample, degrees, BLOCKS) if parts]
    assert len(found) == 2 and torch.equal(*found)
    assert (found[0] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_one_block_that_covers_the_video_is_the_plain_sampler():
    blocks = Blocks(count=1, frames=4, context=1)
    made = torch.cat(_sample(Degrees(), blocks), dim=2)
    transformer = tiny_wan(layers=4)
    scheduler, latents = _scheduler(), _noise(blocks)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            both = [
                transformer(latents, timestep.expand(2), embeds, return_dict=False)[0].float() for embeds in _text(0)
            ]
            velocity = both[1] + 4.0 * (both[0] - both[1])
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    assert (made - latents).abs().max() <= 1e-5 * latents.abs().max()


def test_blocks_are_made_of_the_same_noise_and_never_repeat_their_context():
    first = torch.arange(3.0).reshape(1, 1, 3, 1, 1)
    parts = [part.flatten().tolist() for part in noise_of(first, Blocks(9, 2, 1), [torch.Generator()])]
    assert parts[0] == [0, 1, 2]
    for before, after in itertools.pairwise(parts):
        assert len(after) == 2 and sorted([before[-1], *after]) == [0, 1, 2]


def test_a_length_that_is_not_blocks_is_refused_with_the_next_that_is():
    assert Blocks.covering(257, 2, 1) == Blocks(128, 2, 1)
    with pytest.raises(ValueError, match="11"):
        Blocks.covering(10, 2, 1)
