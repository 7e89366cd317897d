"""Runs on one Ray session, without Prefect: what becomes of targets, budgets, costs and a stop.

What becomes of samples that fail, and of workers that die, is in tests/faults/test_isolation.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infra.storage import Storage
from pipelines.generate import StopRequest
from pipelines.verify import verify

if TYPE_CHECKING:
    from conftest import Runner

pytestmark = pytest.mark.ray


def _prompts(number: int, poor: tuple[int, ...] = ()) -> dict[str, Any]:
    """Prompts 'thing 0' and so on, some of which the judge thinks poor."""
    return {"inline": [f"poor thing {at}" if at in poor else f"thing {at}" for at in range(number)]}


def test_targets_budgets_and_a_stop_end_a_run_cleanly_and_the_next_one_goes_on(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    prompts = _prompts(96, poor=(0, 4))
    layout = {"batch_size": 2}
    # Launched batches finish: with three actors up to eight are under way when an end is asked for.
    steps: list[tuple[dict[str, Any], str, int, int]] = [
        ({"target": {"samples": 5}}, "exhausted", 5, 5),
        ({"target": {"accepted": 8}}, "reached", 10, 22),
        ({"budget": {"bytes": 1}}, "budget", 1, 16),
        ({"budget": {"accelerator_seconds": 0.1}}, "budget", 1, 16),
        ({"budget": {"deadline": "0.1s"}}, "budget", 1, 16),
    ]
    before = 0
    for keys, status, least, most in steps:
        outcome = run(run.spec(root, prompts, layout=layout, **keys))
        rows = len(run.rows(root, "samples"))
        assert outcome.status == status, keys
        assert least <= (rows if "target" in keys else rows - before) <= most, keys
        assert outcome.planned_through == rows  # samples come in order, so what is done is a prefix
        run.check(root, outcome)
        before = rows

    stop = StopRequest()
    outcome = run(
        run.spec(root, prompts, layout=layout), stop=stop, report=lambda now: stop.set("stopped") if now.done else None
    )
    assert outcome.status == "stopped"
    assert before < len(run.rows(root, "samples")) < len(prompts["inline"])
    run.check(root, outcome)


def test_a_reached_target_starts_nothing(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    run(run.spec(root, _prompts(2), target={"accepted": 1}))
    outcome = run(run.spec(root, _prompts(4), target={"accepted": 1}))
    assert (outcome.status, outcome.allocated, outcome.progress.launched) == ("reached", 0.0, 0)
    assert list(verify(Storage(str(root)))) == []
