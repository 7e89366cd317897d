"""Guidance from a difference that is some steps old: the unconditional branch is evaluated at every k-th step.

The residual form of StreamDiffusion's RCFG (Kodaira et al. 2023, arXiv 2312.12491), with the residual renewed: at the steps
between, of the last step at which u was evaluated, marked ',

    u = c - (c - u)',   so that   v = c + (w - 1) (c - u)'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from models.accelerate.course import Cache, Course
from models.accelerate.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

    from models.accelerate.guidance import Guide


@dataclass(frozen=True)
class GuidanceReuse:
    """Evaluate the unconditional branch at every few steps, and reuse its difference at the others."""

    name: ClassVar[str] = "guidance_reuse"

    interval: int = setting(2, "Steps from one evaluation to the next; 1 evaluates at all.", least=1)
    warmup: int = setting(1, "First steps at which it is evaluated.", least=1)


def apply(guide: Guide, config: GuidanceReuse, course: Course) -> Guide:
    """`guide`, given an unconditional prediction that is not always evaluated."""
    cache = Cache(course, whole=True)
    evaluated = -1

    def reusing(c: Tensor, unconditional: Callable[[], Tensor]) -> Tensor:
        def recent() -> Tensor:
            nonlocal evaluated
            if "difference" in cache and course.step >= config.warmup and course.step - evaluated < config.interval:
                course.skip(config.name)
                return c - cache["difference"]
            evaluated, u = course.step, unconditional()
            if config.interval > 1:
                cache["difference"] = c - u
            return u

        return guide(c, recent)

    return reusing
