from __future__ import annotations

import numpy as np
import pytest

from models.plan import SamplerPlan
from stages.canary import TOLERANCE, Canaries, _shortened
from stages.early import EarlyReject
from stages.rubric import load_rubric
from stages.sample import SampleLatents

FIRST = np.random.default_rng(0).standard_normal((1, 16, 5, 8, 8)).astype(np.float32)


def test_the_first_canary_is_what_others_are_held_against() -> None:
    canaries = Canaries()
    assert canaries.differs("H200", FIRST) == ""
    assert canaries.differs("H200", FIRST.copy()) == ""


def test_one_bit_is_too_much_on_the_same_kind_of_device() -> None:
    canaries = Canaries()
    canaries.differs("H200", FIRST)
    other = FIRST.copy()
    other[0, 0, 0, 0, 0] = np.nextafter(other[0, 0, 0, 0, 0], np.float32(9))
    assert "must be the same to the bit" in canaries.differs("H200", other)


@pytest.mark.parametrize(("off", "said"), [(0.9 * TOLERANCE, ""), (1.1 * TOLERANCE, "may be")])
def test_another_kind_of_device_may_differ_within_a_tolerance(off: float, said: str) -> None:
    canaries = Canaries()
    canaries.differs("H200", FIRST)
    other = (FIRST * (1 + off)).astype(np.float32)
    assert said in canaries.differs("A100", other)
    assert bool(canaries.differs("A100", other)) is bool(said)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_first_canary_that_is_not_finite_is_none(value: float) -> None:
    canaries = Canaries()
    broken = FIRST.copy()
    broken[0, 0, 0, 0, 0] = value
    assert "not finite" in canaries.differs("H200", broken)
    assert canaries.differs("H200", FIRST) == ""


def test_another_shape_is_no_match() -> None:
    canaries = Canaries()
    canaries.differs("H200", FIRST)
    assert canaries.differs("A100", FIRST[:, :, :4]) != ""


def test_a_canary_is_not_looked_at() -> None:
    """Of its two steps none may be at the noise level, and one that is stopped says nothing of its device."""
    early = EarlyReject(0.5, 1, "", load_rubric("default"))
    stage = SampleLatents((), SamplerPlan(), 1, early=early)
    assert _shortened(stage).early is None and _shortened(stage).plan.num_inference_steps == 2  # type: ignore[attr-defined]
