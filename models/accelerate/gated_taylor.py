"""Confidence-gated Taylor: the last block's output is forecast where the first block's forecast was right.

Guan et al. 2025, arXiv 2508.02240: 3.17x on FLUX, 4.14x on Wan. Two features have a Taylor series (models.accelerate.taylor),
the outputs h1 of the first and h of the last block; two are little to keep beside TaylorSeer's three of each block. At every
step the first block is computed, and of each sample by itself

    skip where |h1 - forecast h1| / |h1 forecast| < threshold,   then   h = forecast h

in L1. Series go on from steps at which all was computed, and each branch of guidance has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from models.accelerate.course import Cache, Course
from models.accelerate.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

    from models.accelerate.stack import Given, Stack
    from models.accelerate.taylor import Series


@dataclass(frozen=True)
class GatedTaylor:
    """Forecast the last block where the forecast of the first one is right."""

    name: ClassVar[str] = "gated_taylor"

    threshold: float = setting(
        0.05, "Relative error of the first block's forecast below which the last's is taken.", least=0
    )
    order: int = setting(1, "Of the Taylor series; 0 reuses what was computed last.", least=0, most=4)
    warmup: int = setting(3, "First steps at which all is computed.", least=1)
    cooldown: int = setting(1, "Last steps at which all is computed.", least=0)


@contextmanager
def apply(denoiser: Any, config: GatedTaylor, course: Course) -> Iterator[None]:
    """Around one call of the pipeline of `denoiser`."""
    from models.accelerate.stack import stacked

    with stacked(denoiser, course, _Policy(config, Cache(course))):
        yield


class _Policy:
    def __init__(self, config: GatedTaylor, cache: Cache) -> None:
        self.config, self.cache = config, cache
        self.series: dict[str, tuple[Series, Series]] = {}

    def __call__(self, stack: Stack, hidden: Tensor, given: Given) -> Tensor:
        from models.accelerate.stack import all_rows, change
        from models.accelerate.taylor import Series

        course, step = stack.course, stack.course.step
        if course.branch not in self.series:
            self.series[course.branch] = (
                Series(self.config.order, self.cache, (course.branch, "first")),
                Series(self.config.order, self.cache, (course.branch, "last")),
            )
        ours, theirs = self.series[course.branch]
        first = stack.compute(hidden, given, slice(1))
        if ours.terms == 0 or course.is_margin(self.config.warmup, self.config.cooldown):
            wanted = all_rows(hidden)
        else:
            wanted = ~(change(first, ours.forecast(step)) < self.config.threshold)
        out, rows = stack.compute_where(wanted, first, given, slice(1, None), lambda: theirs.forecast(step))
        if rows is None:
            ours.update(step, first)
            theirs.update(step, out)
        else:
            course.skip(self.config.name)
            if len(rows):
                ours.update(step, first[rows], rows)
                theirs.update(step, out[rows], rows)
        return out
