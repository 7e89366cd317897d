"""DualParal: the same bits for any number of stages, and the plain sampler where one block covers the video."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from models.parallel.attention import Split
from models.parallel.degrees import Degrees, build_mesh
from models.parallel.dualparal import Blocks, DualParal, Video, noise_of
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


def _noise(blocks: Blocks, seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 4, blocks.frames + blocks.context, 4, 6, generator=torch.Generator().manual_seed(seed))


def _experts(count: int) -> list[Any]:
    """Denoisers of the same form with other weights."""
    experts = [tiny_wan(layers=4) for _ in range(count)]
    for weight in experts[-1].parameters():
        weight.data *= 1.0 if count == 1 else 1.1
    return experts


BOUNDARY = 900.0
"""Between the first and the second of three timesteps with a shift of 3."""


def _sample(
    degrees: Degrees,
    blocks: Blocks,
    guidance_scale: float = 4.0,
    experts: int = 1,
    seeds: tuple[int, ...] = (3,),
) -> list[torch.Tensor]:
    groups: dict[str, Any] = {}
    if degrees.size > 1:
        mesh = build_mesh(degrees)
        groups = {
            "stages": mesh["dualparal"].get_group(),
            "branches": mesh["cfg"].get_group() if degrees.cfg > 1 else None,
            "split": Split(ulysses=mesh["ulysses"].get_group()),
        }
    boundary = BOUNDARY if experts > 1 else None
    sampler = DualParal(
        _experts(experts), _scheduler, steps=STEPS, boundary=boundary, guidance_scale=guidance_scale, **groups
    )
    videos = [
        Video(_noise(blocks, seed), _text, [torch.Generator().manual_seed(seed + at) for at in (2, 3)])
        for seed in seeds
    ]
    made = list(sampler.sample(videos, blocks))
    assert not made or [place[:2] for place in made] == [(v, b) for v in range(len(seeds)) for b in range(blocks.count)]
    return [latents for _, _, latents in made]


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


@pytest.mark.parametrize("stages", [1, 2])
def test_videos_in_one_queue_are_what_each_is_alone(stages: int, alone: torch.Tensor):
    arguments = (Degrees(dualparal=stages), BLOCKS, 4.0, 1, (3, 11))
    made = on_ranks(stages, _sample, *arguments)[0] if stages > 1 else _sample(*arguments)
    first, second = torch.cat(made[: BLOCKS.count], dim=2), torch.cat(made[BLOCKS.count :], dim=2)
    assert torch.equal(first, alone)
    assert torch.equal(second, torch.cat(_sample(Degrees(), BLOCKS, seeds=(11,)), dim=2))


def test_two_experts_give_the_same_bits_for_any_number_of_stages(alone: torch.Tensor):
    made = torch.cat(_sample(Degrees(), BLOCKS, experts=2), dim=2)
    assert (made - alone).abs().max() > 1e-2 * alone.abs().max()
    assert torch.equal(torch.cat(on_ranks(2, _sample, Degrees(dualparal=2), BLOCKS, 4.0, 2)[0], dim=2), made)


@pytest.mark.parametrize("experts", [1, 2])
def test_one_block_that_covers_the_video_is_the_plain_sampler(experts: int):
    blocks = Blocks(count=1, frames=4, context=1)
    made = torch.cat(_sample(Degrees(), blocks, experts=experts), dim=2)
    models = _experts(experts)
    scheduler, latents = _scheduler(), _noise(blocks)
    assert scheduler.timesteps[0] > BOUNDARY > scheduler.timesteps[1]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            transformer = models[0] if timestep >= BOUNDARY else models[-1]
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


def _peak(degrees: Degrees, count: int) -> float:
    """Most memory of a rank, MiB, for a video of `count` blocks whose latents go out as they are done."""
    mesh = build_mesh(degrees)
    sampler = DualParal(_experts(1), _scheduler, steps=STEPS, stages=mesh["dualparal"].get_group())
    first = torch.randn(1, 4, 3, 32, 48, generator=torch.Generator().manual_seed(1))  # 384 tokens a frame
    text = tuple(part[:1] for part in _text(0))
    for _ in sampler.sample([Video(first, lambda _: text, [torch.Generator()])], Blocks(count, 2, 1)):
        pass
    # Not getrusage: its maximum is that of the parent too, from before this process was started.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def test_no_rank_holds_more_of_a_longer_video():
    short, long = (on_ranks(2, _peak, Degrees(dualparal=2), count) for count in (8, 32))
    for less, more in zip(short, long, strict=True):
        assert more <= 1.05 * less
