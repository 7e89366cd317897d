"""Forecasts against polynomials, whose series are known."""

from __future__ import annotations

import pytest
import torch

from models.accelerate.course import Cache, Course
from models.accelerate.taylor import Series


def series(order: int, rows: int = 2) -> Series:
    return Series(order, Cache(Course(rows, None)), "feature")


def line(step: float) -> torch.Tensor:
    return torch.tensor([[1.0, 2.0], [5.0, -1.0]]) + step * torch.tensor([[0.5, -1.0], [0.25, 3.0]])


def test_order_0_is_what_was_computed_last() -> None:
    known = series(0)
    known.update(0, line(0))
    known.update(3, line(3))
    torch.testing.assert_close(known.forecast(7), line(3))


def test_order_1_continues_a_line_whatever_the_steps_between() -> None:
    known = series(1)
    for step in (0, 1, 5):
        known.update(step, line(step))
    torch.testing.assert_close(known.forecast(8), line(8))


def test_order_2_has_the_second_difference_of_a_parabola() -> None:
    """For F = s^2 at 0, 1, 2: D1 = 3 and D2 = 2 at s = 2, so that F(2 + k) is taken for 4 + 3 k + k^2."""
    known = series(2, 1)
    for step in (0, 1, 2):
        known.update(step, torch.tensor([[float(step**2)]]))
    assert known.forecast(5).item() == pytest.approx(4 + 3 * 3 + 9)


def test_each_sample_has_steps_of_its_own() -> None:
    known = series(1)
    known.update(0, line(0))
    for step in (2, 4):
        known.update(step, line(step)[1:], torch.tensor([1]))
    made = known.forecast(6)
    torch.testing.assert_close(made[0], line(0)[0])
    torch.testing.assert_close(made[1], line(6)[1])
