"""Exactly once: a run loses processes to SIGKILL at random moments and is run again, and the dataset is as if it had not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from chain import Chain, random_plan, summary
from harness import Reference

pytestmark = pytest.mark.ray


def _rng() -> tuple[int, random.Random]:
    seed = int(os.environ.get("DITMILL_FAULT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"seed {seed}")
    return seed, random.Random(seed)


def test_a_run_killed_five_times_is_as_if_it_had_not_been(
    tmp_path: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, rng = _rng()
    plan = [
        ("driver", rng.choice(["at once", "starting", "prompts", "loading"])),
        ("actor", "committed"),
        ("driver", "written"),  # between a part and its transaction
        ("prefect", "loading"),
        ("raylet", "committed"),  # the whole Ray session
    ]
    chains: list[Chain] = []
    struck = 0
    while struck < len(plan):  # a run may be done before its kill comes: then another takes it
        folder = tmp_path / f"chain{len(chains)}"
        folder.mkdir()
        chains.append(Chain(folder, rng))
        chains[-1].take(plan[struck:], reference.latents)
        assert chains[-1].kills
        struck += len(chains[-1].kills)
    with capsys.disabled():
        print("\n" + summary(seed, chains))


@pytest.mark.soak
def test_a_hundred_kills_at_random_moments(
    tmp_path: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, rng = _rng()
    wanted = int(os.environ.get("DITMILL_FAULT_KILLS") or 100)
    chains: list[Chain] = []
    while sum(len(chain.kills) for chain in chains) < wanted:
        folder = tmp_path / f"chain{len(chains)}"
        folder.mkdir()
        chains.append(Chain(folder, rng))
        chains[-1].take(random_plan(rng), reference.latents)
        with capsys.disabled():
            print("\n" + summary(seed, chains[-1:]))
    with capsys.disabled():
        print("\n" + summary(seed, chains))
