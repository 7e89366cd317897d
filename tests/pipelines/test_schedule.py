from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infra.errors import UserError
from infra.storage import Storage
from pipelines.records import unique_records
from pipelines.schedule import Schedule
from pipelines.spec import Spec, parse_spec
from pipelines.verify import verify

if TYPE_CHECKING:
    from conftest import Runner

FIRST, SECOND = "2026-11-21T03:00:00+00:00", "2026-11-22T03:00:00+00:00"
GOLDEN = [4791986144098326212, 1077348267865083988, 269033107149749722]


def _spec(**schedule: Any) -> Spec:
    inline = ["a circle", {"prompt": "a square", "seed": 7}]
    return parse_spec({"prompts": {"inline": inline, "near_duplicates": "ignore"}, "schedule": schedule})


def test_a_tick_enters_the_seed_of_every_record_its_own_ones_too() -> None:
    ids = [{record.prompt_id() for record in unique_records(_spec(tick=tick))} for tick in (None, FIRST, SECOND)]
    assert [len(each) for each in ids] == [2, 2, 2]
    assert len(set.union(*ids)) == 6


def test_seeds_of_a_tick_are_what_they_have_always_been() -> None:
    tick = Schedule(tick=FIRST)
    assert [tick.seed(seed) for seed in (0, 7, 2**63 - 1)] == GOLDEN
    assert all(0 <= seed < 2**63 for seed in GOLDEN)
    assert Schedule().seed(7) == 7


@pytest.mark.parametrize(
    "spelling", ["2026-11-21T03:00:00Z", "2026-11-21 03:00", "2026-11-21T04:00:00+01:00", "2026-11-20T22:00:00-05:00"]
)
def test_one_time_has_one_spelling(spelling: str) -> None:
    assert Schedule(tick=spelling).tick == FIRST


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"cron": "0 3 * *"}, "schedule.cron: expected five fields"),
        ({"every": "6 hours"}, "schedule.every: expected a duration such as 6h"),
        ({"every": "0h"}, "schedule.every: expected a duration such as 6h"),
        ({"every": "6h", "cron": "0 3 * * *"}, "schedule: give one of cron and every"),
        ({"timezone": "Mars/Olympus"}, "schedule.timezone: expected an IANA time zone"),
        ({"tick": "tomorrow"}, "schedule.tick: expected an ISO 8601 time"),
        ({"tick": FIRST, "epoch": "new_prompts"}, "schedule: tick belongs to epoch: scheduled_time"),
        ({"evry": "6h"}, "schedule.evry"),
    ],
)
def test_mistakes_are_said_in_one_line(schedule: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        _spec(**schedule)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.ray
def test_each_tick_makes_its_own_samples_and_meets_its_own_target(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    prompts = {"inline": [f"thing {at}" for at in range(40)]}
    made: dict[str, set[str]] = {}
    for tick in (FIRST, SECOND, FIRST):
        spec = run.spec(root, prompts, target={"accepted": 4}, layout={"batch_size": 2}, schedule={"tick": tick})
        outcome = run(spec)
        rows = {row["sample_id"] for row in run.rows(root, "samples")}
        if tick in made:  # it has what it wants
            assert (outcome.status, outcome.progress.launched) == ("reached", 0)
            assert rows == set.union(*made.values())
        else:
            assert outcome.status == "reached"
            assert outcome.progress.before_accepted == 0
            made[tick] = rows - set().union(*made.values())
            assert len(made[tick]) >= 4
    assert list(map(str, verify(Storage(str(root))))) == []


@pytest.mark.ray
def test_with_new_prompts_a_tick_makes_what_the_dataset_lacks(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    for count, new in ((4, 4), (4, 0), (6, 2)):
        prompts = {"inline": [f"thing {at}" for at in range(count)]}
        outcome = run(run.spec(root, prompts, schedule={"epoch": "new_prompts"}))
        assert outcome.progress.launched == new
    assert len(run.rows(root, "samples")) == 6
