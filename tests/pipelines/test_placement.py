from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infra.errors import UserError
from infra.ray_session import Cluster
from models.plan import SamplerPlan
from pipelines.placement import ActorResources, Compute, Group, in_flight, place, place_stored
from stages.group import InGroup
from stages.sample import SampleLatents
from stages.score import ScoreMedia

STAGE = ScoreMedia()
GENERATING = (STAGE, STAGE, STAGE)
JUDGING = (STAGE,)


def _split(split: bool) -> Compute:
    return Compute(split="stages" if split else "shared")


def _shared(**keys: Any) -> Compute:
    return Compute(split="shared", **keys)


def _cpus(groups: tuple[Group, ...]) -> float:
    return sum(group.actors * group.num_cpus for group in groups)


def _gpus(groups: tuple[Group, ...]) -> float:
    return sum(group.actors * group.num_gpus for group in groups)


@pytest.mark.parametrize("cpus", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("needs_model", [False, True])
def test_place_fits_a_machine_without_gpus(cpus: int, split: bool, needs_model: bool) -> None:
    groups = place(GENERATING, JUDGING, Cluster(cpus, 0), _split(split), needs_model)
    assert _cpus(groups) <= cpus - 0.01  # every actor starts, and the reader finds a place
    assert all(group.actors >= 1 and group.num_gpus == 0 and group.accelerators == 1 for group in groups)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("split", [False, True])
def test_place_fits_the_gpus_and_uses_them(gpus: int, split: bool) -> None:
    groups = place(GENERATING, JUDGING, Cluster(16 * gpus, gpus), _split(split))
    assert gpus - 1 < _gpus(groups) <= gpus
    assert sum(group.accelerators * group.actors for group in groups) == pytest.approx(_gpus(groups))


def test_place_gives_the_judge_no_gpu_where_it_needs_none() -> None:
    groups = place(GENERATING, JUDGING, Cluster(32, 4), needs_model=False)
    assert [group.num_gpus for group in groups] == [1.0, 0.0]
    assert groups[0].actors == 4


@pytest.mark.parametrize(
    ("cpus", "ranks", "samplers"),
    [(1, 1, 1), (2, 1, 2), (4, 1, 4), (16, 1, 16), (64, 1, 63), (2, 2, 1), (4, 2, 2), (4, 3, 1), (5, 3, 1)],
)
def test_place_gives_the_samplers_all_cpus_where_nothing_judges(cpus: int, ranks: int, samplers: int) -> None:
    generating = (InGroup(SampleLatents((), SamplerPlan(), 4), ranks=ranks),)
    sample, judge = place(generating, JUDGING, Cluster(cpus, 0), needs_model=False)
    assert (sample.actors, judge.num_cpus) == (samplers, pytest.approx(0.1))
    taken = samplers * ranks * sample.num_cpus + judge.actors * judge.num_cpus
    assert 0.75 * samplers * ranks * min(1, cpus / ranks) < taken <= cpus - 0.1 + 1e-9
    assert sample.num_cpus + judge.num_cpus < 1 + 1e-9, "a node of one CPU and a sampler has room for who writes"


def test_place_gives_the_judge_of_a_model_a_cpu_as_it_gives_a_sampler() -> None:
    for cpus, samplers in ((2, 1), (4, 3), (16, 14)):
        sample, judge = place(GENERATING, JUDGING, Cluster(cpus, 0))
        assert (sample.actors, sample.num_cpus) == (samplers, judge.num_cpus) and judge.num_cpus > 0.9


@pytest.mark.parametrize(
    ("keys", "sample", "judge"),
    [
        ({"resources": {"judge": {"cpus": 1}}}, (1, 0.9), 1),
        ({"resources": {"sample": {"cpus": 1}}}, (1, 1), 0.1),
        ({"resources": {"sample": {"cpus": 0.9}}}, (2, 0.9), 0.1),
        ({"actors": {"sample": 3}}, (3, 0.6), 0.1),
    ],
)
def test_place_keeps_what_is_asked_for_where_nothing_judges(
    keys: dict[str, Any], sample: tuple[int, float], judge: float
) -> None:
    first, last = place(GENERATING, JUDGING, Cluster(2, 0), _shared(**keys), needs_model=False)
    assert (first.actors, first.num_cpus, last.num_cpus) == (sample[0], *map(pytest.approx, (sample[1], judge)))


def test_place_keeps_what_the_spec_fixes() -> None:
    groups = place(GENERATING, JUDGING, Cluster(64, 8), _shared(actors={"sample": 3, "judge": 2}))
    assert [group.actors for group in groups] == [3, 2]


def test_in_flight_gives_each_actor_a_batch_in_hand_and_one_waiting() -> None:
    groups = place(GENERATING, JUDGING, Cluster(2, 0))
    assert in_flight(groups) >= 2 * sum(group.actors for group in groups)


def test_place_counts_every_rank_of_a_group() -> None:
    group = InGroup(SampleLatents((), SamplerPlan(), 4), ranks=4)
    sample, judge = place((group,), JUDGING, Cluster(2, 0))
    assert sample.actors == 1 and sample.accelerators == 4
    assert sample.num_cpus * 4 + judge.num_cpus <= 2
    assert sample.placed == (replace(group, num_cpus=sample.num_cpus),)
    sample, _ = place((group,), JUDGING, Cluster(32, 8), _shared(), needs_model=False)
    assert (sample.actors, sample.num_gpus, sample.accelerators) == (2, 1, 4)


def test_place_keeps_ranks_on_gpus_of_their_own() -> None:
    group = InGroup(SampleLatents((), SamplerPlan(), 4), ranks=4)
    for gpus in (5, 7, 8, 16):
        groups = place((STAGE, group, STAGE), JUDGING, Cluster(64, gpus), _split(True))
        assert sum(each.actors * each.ranks * each.num_gpus for each in groups) <= gpus
        assert all(each.num_gpus == 1 for each in groups if each.ranks > 1)
    with pytest.raises(UserError, match=r"layout\.parallel: 4 ranks want a GPU each, found 3 of 4"):
        place((group,), JUDGING, Cluster(64, 4))


def test_place_gives_each_group_what_the_spec_asks_for() -> None:
    asked = {"sample": ActorResources(gpus=0.5, cpus=2, accelerator_type="H100"), "judge": ActorResources(gpus=0.25)}
    kinds = {"H100": 4.0, "L4": 2.0}
    sample, judge = place(GENERATING, JUDGING, Cluster(64, 6, kinds), _shared(resources=asked))
    assert (sample.num_cpus, sample.num_gpus, sample.accelerator_type) == (2, 0.5, "H100")
    assert sample.actors == 7  # the judge may come to lie on one of the four H100, too
    assert (judge.num_cpus, judge.num_gpus, judge.accelerator_type) == (1, 0.25, None)
    asked["judge"] = ActorResources(gpus=0.25, accelerator_type="L4")
    assert place(GENERATING, JUDGING, Cluster(64, 6, kinds), _shared(resources=asked))[0].actors == 8


def test_place_shares_what_cpus_are_left_beside_those_asked_for() -> None:
    sample, judge = place(GENERATING, JUDGING, Cluster(4, 0), _shared(resources={"sample": ActorResources(cpus=1.5)}))
    assert (sample.actors, sample.num_cpus) == (2, 1.5)
    assert 0 < judge.num_cpus <= 1


def test_place_gives_encoding_and_decoding_what_is_asked_for_them() -> None:
    resources = {"encode": ActorResources(gpus=0.25), "decode": ActorResources(gpus=0.75)}
    compute = Compute(split="stages", actors={"decode": 2}, resources=resources)
    encode, sample, decode, judge = place(GENERATING, JUDGING, Cluster(64, 4), compute)
    assert [encode.num_gpus, decode.num_gpus, decode.actors] == [0.25, 0.75, 2]
    assert sample.actors * sample.num_gpus + judge.num_gpus + 0.25 + 2 * 0.75 <= 4


def test_place_waits_for_gpus_that_a_cluster_has_yet_to_bring() -> None:
    compute = _shared(actors={"sample": (1, 8)}, resources={"sample": ActorResources(gpus=1, accelerator_type="H100")})
    sample, _ = place(GENERATING, JUDGING, Cluster(2, 0), compute, needs_model=False)
    assert (sample.actors, sample.most_actors, sample.num_gpus, sample.on_gpu_cluster) == (1, 8, 1, True)
    assert in_flight((sample,)) >= 16


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        ({"limits": {"gpus": 4}, "actors": {"sample": (1, 8)}}, r"compute\.limits\.gpus: .* 9 .*sample 8 x 1"),
        (
            {"limits": {"cpus": 2}, "actors": {"sample": 1}, "resources": {"sample": {"cpus": 3}}},
            r"limits\.cpus: .*sample 1 x 3",
        ),
    ],
)
def test_place_refuses_actors_beyond_the_limits(compute: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        place(GENERATING, JUDGING, Cluster(64, 8), _shared(**compute))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"actors": {"sample": 0}}, "1 <= least <= most"),
        ({"actors": {"judge": [3, 2]}}, r"actors\.judge\n.*1 <= least <= most, found \[3, 2\]"),
        ({"actors": {"sample": "two"}}, "found 'two'"),
        ({"actors": {"encode": 2}}, "split: stages"),
        ({"resources": {"decode": {"gpus": 1}}}, "split: stages"),
        ({"resources": {"sample": {"gpus": -1}}}, "gpus"),
        ({"resources": {"sample": {"cpus": 0}}}, "cpus"),
    ],
)
def test_compute_refuses_what_cannot_be(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Compute(**keys)


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_stored_samples_are_read_beside_the_gpus_that_judge_them(gpus: int) -> None:
    read, judging = place_stored(STAGE, (STAGE, STAGE), Cluster(16 * gpus, gpus), Compute())
    assert (read.stages, judging.stages) == ((STAGE,), (STAGE, STAGE))
    assert (read.actors, judging.actors, judging.num_gpus) == (2 * gpus, gpus, 1.0)
    assert read.num_gpus == read.accelerators == 0, "a CPU is no accelerator where there are GPUs"


@pytest.mark.parametrize(("cpus", "gpus", "asked"), [(8, 0, {}), (2, 1, {}), (8, 8, {}), (0, 0, {"gpus": 1.0})])
def test_stored_samples_are_read_by_the_actor_that_judges_where_no_cpu_is_left(
    cpus: int, gpus: int, asked: Any
) -> None:
    compute = Compute(resources={"judge": ActorResources(**asked)})
    (group,) = place_stored(STAGE, (STAGE, STAGE), Cluster(cpus, gpus), compute)
    assert group.stages == (STAGE, STAGE, STAGE)
    assert group.actors == max(1, gpus or cpus - 1)
