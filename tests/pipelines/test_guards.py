from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.guards import Guards, Window

if TYPE_CHECKING:
    from conftest import Runner


def _why(window: Window, accepted: int, rejected: int, failed: int, devices: str = "a/gpu0") -> str:
    breach = window.add(devices, accepted, rejected, failed)
    return "" if breach is None else breach.why


def test_a_window_says_nothing_before_it_is_full() -> None:
    window = Window(Guards(max_failed=0.0, min_accepted=1.0, window=8))
    assert _why(window, 0, 0, 4) == ""
    assert _why(window, 0, 0, 3) == ""
    assert _why(window, 0, 0, 1).startswith("guards.max_failed: 8 of the last 8")


def test_a_share_at_its_bound_is_no_breach_and_one_beyond_is() -> None:
    assert _why(Window(Guards(max_failed=0.25, window=8)), 6, 0, 2) == ""
    assert _why(Window(Guards(max_failed=0.25, window=8)), 5, 0, 3).startswith("guards.max_failed: 3 of the last 8")
    assert _why(Window(Guards(min_accepted=0.5, window=8)), 4, 4, 0) == ""
    assert _why(Window(Guards(min_accepted=0.5, window=8)), 3, 5, 0).startswith("guards.min_accepted: 3 of the last 8")


def test_only_the_last_samples_count() -> None:
    window = Window(Guards(min_accepted=0.5, window=8))
    assert _why(window, 8, 0, 0) == ""
    assert _why(window, 0, 4, 0) == ""  # 8 of 12: without the first batch the window would not be full
    assert _why(window, 0, 4, 0).startswith("guards.min_accepted: 0 of the last 8")
    assert _why(window, 8, 0, 0) == ""


def test_without_guards_nothing_is_a_breach() -> None:
    assert Window(Guards(window=1)).add("", 0, 0, 100) is None


def test_a_device_that_alone_explains_a_breach_is_blamed_before_its_own_window_is_full() -> None:
    window = Window(Guards(min_accepted=0.7, window=32))
    for _ in range(3):
        assert window.add("a/gpu0", 8, 0, 0) is None
    breach = window.add("a/gpu1", 0, 8, 0)  # 24 of 32
    assert breach is None
    breach = window.add("a/gpu1", 0, 8, 0)
    assert breach is not None and breach.devices == "a/gpu1"
    window.forget("a/gpu1")
    assert window.add("a/gpu0", 8, 0, 0) is None


def test_a_device_in_breach_is_blamed_where_the_run_as_a_whole_is_not() -> None:
    window = Window(Guards(max_failed=0.5, window=16))
    for _ in range(2):
        for device in ("a/gpu0", "a/gpu1", "b/gpu0"):
            assert window.add(device, 8, 0, 0) is None
    assert window.add("b/gpu1", 0, 0, 8) is None
    breach = window.add("b/gpu1", 0, 0, 8)
    assert breach is not None
    assert breach == (f"guards.max_failed: 16 of the last 16 samples failed, at most {0.5:.1%} may", "b/gpu1")


def test_where_all_devices_are_in_breach_none_is_blamed() -> None:
    window = Window(Guards(min_accepted=0.5, window=16))
    assert window.add("a/gpu0", 0, 8, 0) is None
    breach = window.add("a/gpu1", 0, 8, 0)
    assert breach is not None and breach.devices == ""


@pytest.mark.ray
def test_a_breach_ends_the_run_with_all_that_was_launched_and_the_next_one_goes_on(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    poor = {"inline": [f"poor thing {at}" for at in range(60)]}
    spec = run.spec(root, poor, layout={"batch_size": 2}, guards={"min_accepted": 0.5, "window": 8})
    outcome = run(spec)
    assert outcome.status == "paused"
    assert outcome.why.startswith("guards.min_accepted: 0 of the last 8")
    # Launched batches finish: up to eight of two samples are under way, with two samplers.
    rows = len(run.rows(root, "samples"))
    assert 8 <= rows <= 8 + 2 * 8
    run.check(root, outcome)

    outcome = run(run.spec(root, poor, layout={"batch_size": 2}, target={"samples": rows + 4}))
    assert outcome.status == "exhausted"
    assert len(run.rows(root, "samples")) == rows + 4
    run.check(root, outcome)


@pytest.mark.ray
def test_failed_samples_are_held_against_their_own_bound(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    broken = {"inline": [f"raise {at}" if at % 2 else f"thing {at}" for at in range(40)]}
    outcome = run(run.spec(root, broken, layout={"batch_size": 2}, guards={"max_failed": 0.1, "window": 8}))
    assert outcome.status == "paused"
    assert outcome.why.startswith("guards.max_failed: 4 of the last 8")
    run.check(root, outcome)
