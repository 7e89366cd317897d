"""A measured figure beside its target, and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from models.pack.train.intervals import bootstrap, wilson

Sense = Literal["at least", "at most"]


@dataclass(frozen=True)
class Figure:
    """What was measured on `n` things; `low` and `high` bound its 95% interval, None where it has none.

    A `value` of None says that there was nothing to measure, `note` why.
    """

    part: str
    name: str
    value: float | None
    n: int = 0
    low: float | None = None
    high: float | None = None
    unit: str = ""
    target: float | None = None
    sense: Sense = "at least"
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where there is no target or nothing was measured."""
        if self.target is None or self.value is None:
            return None
        return self.value >= self.target if self.sense == "at least" else self.value <= self.target

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def share(part: str, name: str, right: int, asked: int, target: float | None = None) -> Figure:
    """A share in percent, with Wilson's interval. `target` is a share of 1."""
    percent = None if target is None else 100 * target
    if not asked:
        return Figure(part, name, None, unit="%", target=percent, note="none to measure")
    low, high = wilson(right, asked)
    return Figure(part, name, 100 * right / asked, asked, 100 * low, 100 * high, "%", percent)


def resampled(
    part: str, name: str, figure: Callable[..., float], *columns: np.ndarray, unit: str = "", **target: Any
) -> Figure:
    """`figure(*columns)` with its bootstrap interval; NaN is nothing to measure."""
    value = figure(*columns) if len(columns[0]) else float("nan")
    if np.isnan(value):
        return Figure(part, name, None, unit=unit, note="none to measure", **target)
    low, high = bootstrap(figure, *columns)
    return Figure(part, name, float(value), len(columns[0]), low, high, unit, **target)


def table(figures: Sequence[Figure]) -> str:
    """One line a figure, those of one part together."""
    wide = max([10, *(len(each.part) for each in figures)]) + 1
    lines = [f"{'':{wide + 49}}{'measured':>12}  {'95% interval':16}{'n':>6}   target"]
    before = ""
    for each in figures:
        part = each.part if each.part != before else ""
        before = each.part
        interval = "" if each.low is None or each.high is None else f"[{_number(each.low)}, {_number(each.high)}]"
        value = each.note or "-" if each.value is None else f"{_number(each.value)}{each.unit and ' ' + each.unit}"
        goal = "" if each.target is None else f"{each.sense} {_number(each.target)}"
        verdict = {None: "", True: ": met", False: ": MISSED"}[each.met]
        lines.append(
            f"{part:{wide}}{each.name:49}{value:>12}  {interval:16}{each.n or '':>6}   {goal}{verdict}".rstrip()
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three digits that matter, but no exponent."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}".rstrip("0").rstrip(".")
