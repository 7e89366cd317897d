"""A schedule as data: which parts of which blocks are computed at which step; the others give what they gave last.

ECAD (Aggarwal et al. 2025, arXiv 2506.15682) searches such schedules by a genetic algorithm, once for a checkpoint, and finds
them better than any rule made by hand. Here is what runs one. A part is a block's self-attention (attn1), cross-attention
(attn2) or feed-forward (ffn), before its gate. Nothing depends on the sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from models.accelerate.course import Cache, Course
from models.accelerate.settings import SettingError, setting

if TYPE_CHECKING:
    from torch import Tensor

ALL = "all"
_PART = re.compile(r"(\*|\d+)\.(attn1|attn2|ffn)")


@dataclass(frozen=True)
class Schedule:
    """Compute the parts that a list names, step by step."""

    name: ClassVar[str] = "schedule"

    steps: tuple[str, ...] = setting(
        (),
        "What each step computes, one text a step: all, or parts as 0.attn1 5.ffn, with * for every block; empty for nothing."
        " The first is all.",
    )

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] != ALL:
            found = repr(self.steps[0]) if self.steps else "none"
            raise SettingError("steps", f"expected a text for each step, the first of them all, found {found}")
        for at, step in enumerate(self.steps):
            wrong = [part for part in str(step).split() if not _PART.fullmatch(part)]
            if not isinstance(step, str) or (wrong and step != ALL):
                raise SettingError(f"steps.{at}", f"expected all, or parts such as 0.attn1 or *.ffn, found {step!r}")
        plain = tuple(ALL if step == ALL else " ".join(sorted(set(step.split()), key=_place)) for step in self.steps)
        object.__setattr__(self, "steps", plain)

    def computes(self, step: int, block: int, part: str) -> bool:
        if step >= len(self.steps) or self.steps[step] == ALL:
            return True
        return not {f"{block}.{part}", f"*.{part}"}.isdisjoint(self.steps[step].split())


@contextmanager
def apply(denoiser: Any, config: Schedule, course: Course) -> Iterator[None]:
    """Around one call of the pipeline of `denoiser`. UserError where the list names a block that it has not."""
    from infra.errors import UserError
    from models.accelerate.stack import blocks_of, parts_answered

    count = len(blocks_of(denoiser))
    named = {int(part.split(".")[0]) for step in config.steps for part in step.split() if part[0].isdigit()}
    if named and max(named) >= count:
        raise UserError(
            f"sampler.accelerate: {config.name} names block {max(named)}, and this denoiser has blocks 0 to {count - 1};"
            " use a schedule that was made for it"
        )
    cache = Cache(course)

    def answer(block: int, part: str, compute: Callable[[], Tensor]) -> Tensor:
        key = (course.branch, block, part)
        if key in cache and not config.computes(course.step, block, part):
            course.skip(config.name)
            return cache[key]
        value = compute()
        if any(not config.computes(step, block, part) for step in range(course.step + 1, len(config.steps))):
            cache[key] = value
        return value

    with parts_answered(denoiser, course, answer):
        yield


def _place(part: str) -> tuple[int, str]:
    block, name = part.split(".")
    return (-1 if block == "*" else int(block), name)
