"""Guidance in a limited interval of noise levels: outside of it the unconditional branch is not evaluated.

Kynkäänniemi et al. 2024, arXiv 2404.07724: guidance harms at high noise and is not needed at low noise. With the step's noise
level sigma, of a flow from 1 to 0:

    v = u + w (c - u) where low <= sigma <= high,   v = c elsewhere
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from models.accelerate.course import Course
from models.accelerate.settings import SettingError, setting

if TYPE_CHECKING:
    from torch import Tensor

    from models.accelerate.guidance import Guide


@dataclass(frozen=True)
class GuidanceInterval:
    """Guide only between two noise levels."""

    name: ClassVar[str] = "guidance_interval"

    low: float = setting(0.0, "Sigma below which the unconditional branch is not evaluated.", least=0, most=1)
    high: float = setting(1.0, "Sigma above which it is not.", least=0, most=1)

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise SettingError("low", f"expected less than high: {self.high:g}, found {self.low:g}")


def apply(guide: Guide, config: GuidanceInterval, course: Course) -> Guide:
    """`guide` inside of the interval, the conditional prediction elsewhere."""

    def limited(c: Tensor, unconditional: Callable[[], Tensor]) -> Tensor:
        if config.low <= course.sigma <= config.high:
            return guide(c, unconditional)
        course.skip(config.name)
        return c

    return limited
