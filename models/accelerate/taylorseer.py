"""TaylorSeer: from features computed at every few steps, those of the steps between are forecast.

Liu et al. 2025, arXiv 2503.06923: 4.99x on FLUX, 5.00x on HunyuanVideo. Features are the outputs of each block's
self-attention, cross-attention and feed-forward (`keep: parts`), each with a Taylor series (models.accelerate.taylor): the
paper's way, and order + 1 times all of them to keep. With `keep: last` the last block's output alone is kept and forecast,
which takes 1 / (3 blocks) of that. Which steps are computed does not depend on the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
class TaylorSeer:
    """Compute every few steps, and forecast the others."""

    name: ClassVar[str] = "taylorseer"

    interval: int = setting(4, "Steps from one that is computed to the next; 1 computes all.", least=1)
    order: int = setting(1, "Of the Taylor series; 0 reuses what was computed last.", least=0, most=4)
    warmup: int = setting(3, "First steps at which all is computed.", least=1)
    cooldown: int = setting(1, "Last steps at which all is computed.", least=0)
    keep: str = setting(
        "parts", "What is kept and forecast: the parts of each block, or the last block.", choices=("parts", "last")
    )

    def computes(self, course: Course, last: int) -> bool:
        """Is this step computed, where step `last` was, of this branch? A branch need not be asked at every step."""
        return course.is_margin(self.warmup, self.cooldown) or course.step - last >= self.interval


@contextmanager
def apply(denoiser: Any, config: TaylorSeer, course: Course) -> Iterator[None]:
    """Around one call of the pipeline of `denoiser`."""
    from models.accelerate.stack import parts_answered, stacked

    features = _Features(config, course)
    if config.keep == "last":
        with stacked(denoiser, course, features.last):
            yield
    else:
        with parts_answered(denoiser, course, features.part):
            yield


class _Features:
    def __init__(self, config: TaylorSeer, course: Course) -> None:
        self.config, self.course, self.cache = config, course, Cache(course)
        self.series: dict[tuple[str, int, str], Series] = {}
        self.computed: dict[tuple[str, int, str], int] = {}

    def last(self, stack: Stack, hidden: Tensor, given: Given) -> Tensor:
        return self.part(-1, "", lambda: stack.compute(hidden, given))

    def part(self, block: int, part: str, compute: Callable[[], Tensor]) -> Tensor:
        from models.accelerate.taylor import Series

        key = (self.course.branch, block, part)
        if key in self.series and not self.config.computes(self.course, self.computed[key]):
            self.course.skip(self.config.name)
            return self.series[key].forecast(self.course.step)
        value, self.computed[key] = compute(), self.course.step
        self.series.setdefault(key, Series(self.config.order, self.cache, key)).update(self.course.step, value)
        return value
