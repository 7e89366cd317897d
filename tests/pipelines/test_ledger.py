"""The ledger's sums: every accelerator-second that actors held is a row's cost or a kind of overhead."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.ledger import Ledger


def _entry(actor: str, started: float, ended: float, **seconds: float) -> dict[str, Any]:
    """An actor whose boot, load and busy seconds are given; the rest of its life it was idle."""
    slot, _, life = actor.partition(":")
    spent = {"boot": 0.0, "load": 0.0, "busy": 0.0, "shared": 0.0, **seconds}
    idle = ended - started - spent["boot"] - spent["load"] - spent["busy"]
    return {
        "actor": actor,
        "slot": slot,
        "slot_started_at": seconds.get("slot_started", started),
        "accelerators": seconds.get("accelerators", 1.0),
        "started_at": started,
        "ended_at": ended,
        "boot_seconds": spent["boot"],
        "load_seconds": spent["load"],
        "idle_seconds": idle,
        "busy_seconds": spent["busy"],
        "shared_seconds": spent["shared"],
        "reproducible": "bitwise" if life != "odd" else "tolerance",
    }


def _sums_up(ledger: Ledger, until: float, rows: float) -> dict[str, float]:
    overhead = ledger.overhead(until, rows)
    assert sum(overhead.values()) + rows == pytest.approx(ledger.allocated(until))
    assert min(overhead.values()) >= 0
    return overhead


def test_the_newest_entry_of_an_actor_counts() -> None:
    ledger = Ledger()
    ledger.add([_entry("a", 0, 10, boot=2, load=3, busy=4, shared=3)])
    ledger.add([_entry("a", 0, 20, boot=2, load=3, busy=10, shared=8), _entry("a", 0, 15, boot=2, load=3, busy=6)])
    assert ledger.allocated(25) == 25
    kinds = _sums_up(ledger, 25, rows=8)
    assert kinds == pytest.approx({"boot": 2, "load": 3, "idle": 5, "unshared": 2, "repeats": 0, "lost": 0, "tail": 5})


def test_rows_that_were_computed_and_not_committed_are_repeats() -> None:
    ledger = Ledger()
    ledger.add([_entry("a", 0, 20, busy=10, shared=10)])
    assert _sums_up(ledger, 20, rows=7)["repeats"] == pytest.approx(3)


def test_a_worker_that_died_is_lost_time_until_the_next_one_starts() -> None:
    ledger = Ledger()
    ledger.add([_entry("a:1", 0, 10, busy=5, shared=5), _entry("a:2", 14, 20, boot=1, busy=2, shared=2)])
    assert ledger.allocated(20) == 20
    assert _sums_up(ledger, 20, rows=7)["lost"] == pytest.approx(4)


def test_a_process_that_waited_for_the_death_does_not_count_twice() -> None:
    ledger = Ledger()
    ledger.add([_entry("a:1", 0, 10, busy=5, shared=5), _entry("a:2", 7, 20, boot=5, busy=2, shared=2)])
    kinds = _sums_up(ledger, 20, rows=7)
    assert (kinds["lost"], kinds["boot"]) == pytest.approx((0, 2))


def test_a_worker_that_died_before_it_reported_held_its_slot_from_the_start() -> None:
    ledger = Ledger()
    ledger.add([_entry("a:2", 14, 20, busy=2, shared=2, slot_started=3)])
    assert ledger.allocated(20) == 17
    assert _sums_up(ledger, 20, rows=2)["lost"] == pytest.approx(11)


def test_released_actors_cost_nothing_any_more() -> None:
    ledger = Ledger()
    ledger.add([_entry("a", 0, 10, busy=10, shared=10)])
    ledger.release(12)
    ledger.add([_entry("b", 20, 30, busy=10, shared=10, accelerators=2.0)])
    assert ledger.allocated(40) == 12 + 2 * 20
    assert _sums_up(ledger, 40, rows=30)["tail"] == pytest.approx(2 + 2 * 10)


def test_a_run_is_as_reproducible_as_the_least_of_its_workers() -> None:
    ledger = Ledger()
    assert ledger.reproducible == ""
    ledger.add([_entry("a", 0, 1)])
    assert ledger.reproducible == "bitwise"
    ledger.add([_entry("b:odd", 0, 1)])
    assert ledger.reproducible == "tolerance"


def test_the_busy_share_counts_each_actor_by_its_accelerators() -> None:
    ledger = Ledger()
    assert ledger.busy_share == 0.0
    ledger.add([_entry("a", 0, 10, boot=2, load=3, busy=5), _entry("b", 0, 10, busy=10, accelerators=3.0)])
    assert ledger.busy_share == pytest.approx((5 + 30) / (10 + 30))
