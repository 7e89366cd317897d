"""The space of plans that a search varies: what its numbers mean, and that all of it can be followed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from models.accelerate.genome import Choice, Space, Whole, bent, space_of
from models.accelerate.registry import check
from models.families import family_of
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan

BASE = SamplerPlan(num_inference_steps=20, guidance_scale=1.75, max_sequence_length=48)
WAN = family_of("WanPipeline")


def followed(plan: SamplerPlan) -> bool:
    try:
        check(plan, WAN, Degrees())
    except Exception:
        return False
    return True


@pytest.fixture(scope="module")
def space() -> Space:
    return space_of(followed, BASE, 3.0, (1.0,) * 20)


def drawn(space: Space, rng: np.random.Generator) -> dict[str, Any]:
    genome: dict[str, Any] = {}
    for name, dimension in space.dimensions.items():
        if isinstance(dimension, Choice):
            genome[name] = dimension.values[int(rng.integers(len(dimension.values)))]
        elif isinstance(dimension, Whole):
            genome[name] = int(rng.integers(dimension.low, dimension.high + 1))
        else:
            genome[name] = float(rng.uniform(dimension.low, dimension.high))
    return genome


def test_the_first_seed_is_the_plan_itself(space: Space) -> None:
    first, *others = space.seeds()
    assert space.plan(first) == BASE
    assert len({space.plan(each).plan_id for each in others} | {BASE.plan_id}) == len(others) + 1


def test_every_genome_is_a_plan_that_the_registry_lets_pass(space: Space) -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    plans = [space.plan(drawn(space, rng)) for _ in range(500)]
    for plan in plans:
        check(plan, WAN, Degrees())
        assert plan.sigmas is None or len(plan.sigmas) == plan.num_inference_steps
        assert plan.sigmas is None or plan.shift is None
    named = {json.loads(item)["technique"] for plan in plans for item in plan.accelerate}
    assert named == {
        "first_block",
        "gated_taylor",
        "taylorseer",
        "magcache",
        "guidance_interval",
        "guidance_reuse",
        "guidance_rescale",
    }
    assert {plan.guidance_scale for plan in plans} >= {1.0}  # without guidance it costs half


def test_bent_sigmas_are_shifted_and_closer_together_where_the_bend_says() -> None:
    even = bent(8, 3.0, 1.0)
    assert even == pytest.approx([3 * u / (1 + 2 * u) for u in np.linspace(1, 0, 9)[:-1]], abs=1e-4)
    for bend in (0.6, 1.6):
        assert all(before > after for before, after in pairwise(bent(50, 5.0, bend)))
        assert bent(50, 5.0, bend)[0] == 1.0
    # Of eight steps, so many lie above a noise level of 0.75.
    counts = [sum(sigma > 0.75 for sigma in bent(8, 3.0, bend)) for bend in (0.6, 1.0, 1.6)]
    assert counts == sorted(counts) and counts[0] < counts[2]


def test_what_the_checkpoint_cannot_follow_is_no_part_of_the_space() -> None:
    def no_caches(plan: SamplerPlan) -> bool:
        return (
            plan.scheduler != "dpmpp" and plan.sigmas is None and not any("first_block" in i for i in plan.accelerate)
        )

    space = space_of(no_caches, BASE, 3.0, ())
    assert "bend" not in space.dimensions
    cache, solver = space.dimensions["cache"], space.dimensions["solver"]
    assert isinstance(cache, Choice) and isinstance(solver, Choice)
    assert cache.values == ("none", "gated_taylor", "taylorseer")
    assert solver.values == ("given", "unipc/2", "unipc/3", "euler")
    assert all({"first_block", "magcache"}.isdisjoint(map(str, seed.values())) for seed in space.seeds())
    unguided = space_of(followed, replace(BASE, guidance_scale=1.0), None, ())
    assert not any(name.startswith(("guidance", "shift")) for name in unguided.dimensions)
