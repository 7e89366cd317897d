"""The simulator of `bench dualparal` agrees with the schedule's closed form where stages are alike and links are free."""

from __future__ import annotations

import pytest

from models.parallel.schedule import makespan
from tests.bench.support.simulator import Costs, Link, dualparal, ulysses

FREE = Link(0.0, float("inf"))


def _costs(**changes: float) -> Costs:
    found = {"layer": 1.0, "fixed": 0.0, "ends": 0.0, "weights": 100.0, "hidden": 10.0, "velocity": 2.0, "cache": 1.0}
    return Costs(**(found | changes))


@pytest.mark.parametrize(
    ("blocks", "steps", "stages"), [(1, 3, 2), (33, 5, 1), (33, 5, 2), (33, 5, 4), (32, 50, 8), (4, 3, 4)]
)
def test_equal_stages_take_the_makespan(blocks: int, steps: int, stages: int):
    found = dualparal(blocks, steps, stages, stages, _costs(), FREE)
    assert found.seconds == makespan(blocks, steps, stages)
    assert found.busy == blocks * steps


def test_uneven_stages_wait_for_the_longest_and_links_add_up():
    even, uneven = (dualparal(40, 10, 2, layers, _costs(), FREE) for layers in (4, 5))
    assert uneven.seconds / even.seconds == pytest.approx(1.5, rel=0.02)  # 3 layers instead of 2 in the longest
    alone = dualparal(1, 1, 2, 2, _costs(), Link(0.5, 10.0))
    assert alone.seconds == 1 + (0.5 + 1.0) + 1 + (0.5 + 0.2)  # hidden states on, the velocity back
    assert dualparal(3, 2, 1, 4, _costs(), Link(9.0, 1.0)).sent == 0


def test_ulysses_divides_compute_and_pays_four_exchanges_a_layer():
    alone, both = (ulysses(100, 2, ranks, 3, 8.0, 10.0, 50.0, Link(0.0, 1000.0)) for ranks in (1, 2))
    assert alone.seconds == 2 * 3 * 8.0
    assert both.seconds == 2 * 3 * (4.0 + 4 * 250 / 1000)
    assert both.sent == 2 * 3 * 4 * 250
