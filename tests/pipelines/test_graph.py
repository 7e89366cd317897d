from __future__ import annotations

from dataclasses import replace

import pytest

from infra.errors import UserError
from models.plan import SamplerPlan
from pipelines.graph import Group, in_flight, place
from stages.group import InGroup
from stages.sample import SampleLatents
from stages.score import ScoreMedia

STAGE = ScoreMedia()
GENERATING = (STAGE, STAGE, STAGE)
JUDGING = (STAGE,)


def _cpus(groups: tuple[Group, ...]) -> float:
    return sum(group.actors * group.num_cpus for group in groups)


def _gpus(groups: tuple[Group, ...]) -> float:
    return sum(group.actors * group.num_gpus for group in groups)


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("split", [False, True])
def test_place_fits_a_machine_without_gpus(cpus: int, split: bool) -> None:
    groups = place(GENERATING, JUDGING, cpus, 0, split=split)
    assert _cpus(groups) <= cpus  # every actor starts, and the reader finds a place
    assert all(group.actors >= 1 and group.num_gpus == 0 and group.accelerators == 1 for group in groups)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("split", [False, True])
def test_place_fits_the_gpus_and_uses_them(gpus: int, split: bool) -> None:
    groups = place(GENERATING, JUDGING, 16 * gpus, gpus, split=split)
    assert gpus - 1 < _gpus(groups) <= gpus
    assert sum(group.accelerators * group.actors for group in groups) == pytest.approx(_gpus(groups))


def test_place_gives_the_judge_no_gpu_where_it_needs_none() -> None:
    groups = place(GENERATING, JUDGING, 32, 4, needs_model=False)
    assert [group.num_gpus for group in groups] == [1.0, 0.0]
    assert groups[0].actors == 4


def test_place_keeps_what_the_spec_fixes() -> None:
    groups = place(GENERATING, JUDGING, 64, 8, actors={"sample": 3, "judge": 2})
    assert [group.actors for group in groups] == [3, 2]


def test_in_flight_gives_each_actor_a_batch_in_hand_and_one_waiting() -> None:
    groups = place(GENERATING, JUDGING, 2, 0)
    assert in_flight(groups) >= 2 * sum(group.actors for group in groups)


def test_place_counts_every_rank_of_a_group() -> None:
    group = InGroup(SampleLatents((), SamplerPlan(), 4), ranks=4)
    sample, judge = place((group,), JUDGING, cpus=2, gpus=0)
    assert sample.actors == 1 and sample.accelerators == 4
    assert sample.num_cpus * 4 + judge.num_cpus <= 2
    assert sample.placed == (replace(group, num_cpus=sample.num_cpus),)
    sample, _ = place((group,), JUDGING, cpus=32, gpus=8, needs_model=False)
    assert (sample.actors, sample.num_gpus, sample.accelerators) == (2, 1, 4)


def test_place_keeps_ranks_on_gpus_of_their_own() -> None:
    group = InGroup(SampleLatents((), SamplerPlan(), 4), ranks=4)
    for gpus in (5, 7, 8, 16):
        groups = place((STAGE, group, STAGE), JUDGING, 64, gpus, split=True)
        assert sum(each.actors * each.ranks * each.num_gpus for each in groups) <= gpus
        assert all(each.num_gpus == 1 for each in groups if each.ranks > 1)
    with pytest.raises(UserError, match=r"layout\.parallel: 4 ranks want a GPU each, found 3 of 4"):
        place((group,), JUDGING, 64, 4)
