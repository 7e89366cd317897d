"""Runs on one Ray session, without Prefect: what becomes of samples, targets, budgets, costs and workers that die."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Storage
from infra.tables import Table
from pipelines.generate import Outcome, Progress, StopRequest
from pipelines.run import Cluster, clean_up, expand, make_samples, open_dataset, sample_groups
from pipelines.spec import Spec, parse_spec
from pipelines.verify import verify

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
OWN_CODE = REPO / "tests" / "faults"

Runner = Callable[..., Outcome]


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file whose presence mends the test's own judge."""
    return tmp_path_factory.mktemp("judge") / "mended"


@pytest.fixture(scope="module")
def cluster(mended: Path) -> Iterator[Cluster]:
    from infra.ray_session import ray_session
    from pipelines.graph import worker_env

    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(OWN_CODE)
    os.environ["DITMILL_TEST_MENDED"] = str(mended)
    try:
        with ray_session(None, worker_env(1)) as found:
            yield Cluster(found["cpus"], found["gpus"])
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def run(cluster: Cluster) -> Runner:
    """Takes a spec through all but Prefect, the report and the card."""

    def take(
        spec: Spec,
        stop: StopRequest | None = None,
        report: Callable[[Progress], Any] = lambda _: None,
        retry: bool = False,
    ) -> Outcome:
        from pipelines.resolve import resolve_spec

        found = resolve_spec(spec)
        open_dataset(found)
        groups = lambda: sample_groups(found, cluster)  # noqa: E731
        enumeration, _ = expand(found, groups)
        try:
            return make_samples(found, enumeration, groups, stop or StopRequest(), report, retry_failed=retry)
        finally:
            clean_up(found)

    return take


def _spec(root: Path, prompts: list[str], **keys: Any) -> Spec:
    spec: dict[str, Any] = {
        "prompts": {"inline": prompts, "near_duplicates": "ignore"},
        "layout": {"batch_size": 4},
        "sampler": {"num_inference_steps": 2},
        "judge": {"backend": "call", "call": "own_judge:score", "version": "1", "thresholds": {"worth": 0.5}},
        "score": {"reject_duplicates": False},
        "caption": None,
        "output": {"uri": str(root), "commit_every": 0.1},
    }
    return parse_spec(spec | keys)


def _prompts(number: int, **said: str) -> list[str]:
    """Prompts 'thing 0' and so on, some with a word for the judge."""
    return [f"thing {at} {said.get(f'at{at}', '')}".strip() for at in range(number)]


def _rows(root: Path, table: str) -> list[dict[str, Any]]:
    return Table(Storage(str(root)), table).read().to_pylist()


def _ended(root: Path) -> list[dict[str, Any]]:
    rows = [row for row in _rows(root, "runs") if row["event"] == "ended"]
    return sorted(rows, key=lambda row: row["created_at"])


def _is_whole(root: Path, outcome: Outcome) -> None:
    """All promises hold, and all of what actors held is in a row's cost or in the run's overhead."""
    storage = Storage(str(root))
    assert list(map(str, verify(storage))) == []
    run = _ended(root)[-1]
    assert run["status"] == outcome.status
    assert run["allocated_accelerator_seconds"] == outcome.allocated
    rows = [row for table in ("samples", "failures") for row in _rows(root, table) if row["run_id"] == run["run_id"]]
    spent = sum(cost["accelerator_seconds"] for row in rows for cost in row["cost"])
    overhead = json.loads(run["overhead_json"])
    assert spent + sum(overhead.values()) == pytest.approx(outcome.allocated, rel=0.02)
    assert min(overhead.values()) >= 0


def test_prompts_that_kill_their_worker_fail_alone_and_succeed_when_the_cause_is_gone(
    tmp_path: Path, run: Runner, mended: Path
) -> None:
    root = tmp_path / "data"
    spec = _spec(root, _prompts(12, at1="kill", at2="poor", at6="kill", at7="kill"))

    outcome = run(spec)
    assert outcome.status == "exhausted"
    assert (outcome.progress.accepted, outcome.progress.rejected, outcome.progress.failed) == (8, 1, 3)
    failures = _rows(root, "failures")
    assert sorted(row["prompt"] for row in failures) == ["thing 1 kill", "thing 6 kill", "thing 7 kill"]
    assert {(row["error_type"], row["attempt"]) for row in failures} == {("worker_died", 1)}
    samples = _rows(root, "samples")
    assert len(samples) == 9
    assert [row["prompt"] for row in samples if row["verdict"] == "rejected"] == ["thing 2 poor"]
    assert outcome.overhead["lost"] + outcome.overhead["repeats"] > 0
    _is_whole(root, outcome)

    mended.touch()
    try:
        outcome = run(spec, retry=True)
    finally:
        mended.unlink()
    assert outcome.progress.accepted == 3
    assert len({row["sample_id"] for row in _rows(root, "samples")}) == 12
    _is_whole(root, outcome)


def test_targets_budgets_and_a_stop_end_a_run_cleanly_and_the_next_one_goes_on(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    prompts = _prompts(72, at0="poor", at4="poor")
    layout = {"batch_size": 2}
    # Launched batches finish: with two actors up to four are under way when an end is asked for.
    steps: list[tuple[dict[str, Any], str, int, int]] = [
        ({"target": {"samples": 5}}, "exhausted", 5, 5),
        ({"target": {"accepted": 8}}, "reached", 10, 18),
        ({"budget": {"bytes": 1}}, "budget", 1, 12),
        ({"budget": {"accelerator_seconds": 0.1}}, "budget", 1, 12),
        ({"budget": {"deadline": "0.1s"}}, "budget", 1, 12),
    ]
    before = 0
    for keys, status, least, most in steps:
        outcome = run(_spec(root, prompts, layout=layout, **keys))
        rows = len(_rows(root, "samples"))
        assert outcome.status == status, keys
        assert least <= (rows if "target" in keys else rows - before) <= most, keys
        assert outcome.planned_through == rows  # samples come in order, so what is done is a prefix
        _is_whole(root, outcome)
        before = rows

    stop = StopRequest()
    outcome = run(
        _spec(root, prompts, layout=layout), stop=stop, report=lambda now: stop.set("stopped") if now.done else None
    )
    assert outcome.status == "stopped"
    assert before < len(_rows(root, "samples")) < len(prompts)
    _is_whole(root, outcome)


def test_a_reached_target_starts_nothing(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    run(_spec(root, _prompts(2), target={"accepted": 1}))
    outcome = run(_spec(root, _prompts(4), target={"accepted": 1}))
    assert (outcome.status, outcome.allocated, outcome.progress.launched) == ("reached", 0.0, 0)
    assert list(verify(Storage(str(root)))) == []
