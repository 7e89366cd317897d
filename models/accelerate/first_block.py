"""First-block cache: where the first block does what it did, the others are taken to do what they did.

From ParaAttention (chengzeyi/ParaAttention), after TeaCache's relative change (arXiv 2411.19108). With h0 and h1 before and
after the first block, and h after the last one, of each sample by itself:

    skip where |(h1 - h0) - (h1 - h0)'| / |(h1 - h0)'| < threshold,   then   h = h1 + (h - h1)'

in L1, where ' marks the last step at which the sample's blocks were all computed. Each branch of guidance has its own.
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


@dataclass(frozen=True)
class FirstBlock:
    """Skip all blocks but the first where it changes little from step to step."""

    name: ClassVar[str] = "first_block"

    threshold: float = setting(
        0.1, "Relative change of the first block's residual below which the rest is reused.", least=0
    )
    warmup: int = setting(0, "First steps at which all is computed.", least=0)
    cooldown: int = setting(0, "Last steps at which all is computed.", least=0)


@contextmanager
def apply(denoiser: Any, config: FirstBlock, course: Course) -> Iterator[None]:
    """Around one call of the pipeline of `denoiser`."""
    from models.accelerate.stack import stacked

    with stacked(denoiser, course, _Policy(config, Cache(course))):
        yield


class _Policy:
    def __init__(self, config: FirstBlock, cache: Cache) -> None:
        self.config, self.cache = config, cache

    def __call__(self, stack: Stack, hidden: Tensor, given: Given) -> Tensor:
        from models.accelerate.stack import all_rows, change

        course, cache = stack.course, self.cache
        residual, rest = (course.branch, "residual"), (course.branch, "rest")
        first = stack.compute(hidden, given, slice(1))
        made = first - hidden
        if residual not in cache or course.is_margin(self.config.warmup, self.config.cooldown):
            wanted = all_rows(hidden)
        else:
            wanted = ~(change(made, cache[residual]) < self.config.threshold)
        out, rows = stack.compute_where(wanted, first, given, slice(1, None), lambda: first + cache[rest])
        if rows is None:
            cache[residual], cache[rest] = made, out - first
        else:
            course.skip(self.config.name)
            cache.put(residual, made[rows], rows)
            cache.put(rest, out[rows] - first[rows], rows)
        return out
