"""Rescaled guidance: a guided prediction as strong as the conditional one.

Lin et al. 2023, arXiv 2305.08891 (section 3.4), used by EzAudio (arXiv 2409.10819) among others: guidance makes predictions
too large, and pictures over-exposed. With the standard deviation s over all of a sample's values:

    v' = factor v s(c) / s(v) + (1 - factor) v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from models.accelerate.course import Course
from models.accelerate.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

    from models.accelerate.guidance import Guide


@dataclass(frozen=True)
class GuidanceRescale:
    """Rescale the guided prediction to the standard deviation of the conditional one. It saves nothing."""

    name: ClassVar[str] = "guidance_rescale"

    factor: float = setting(0.7, "Share of the rescaled prediction; 0 changes nothing.", least=0, most=1)


def apply(guide: Guide, config: GuidanceRescale, course: Course) -> Guide:
    """`guide`, and what it makes rescaled."""

    def rescaled(c: Tensor, unconditional: Callable[[], Tensor]) -> Tensor:
        v = guide(c, unconditional)
        return v if config.factor == 0 else v * (config.factor * _deviation(c) / _deviation(v) + (1 - config.factor))

    return rescaled


def _deviation(values: Tensor) -> Tensor:
    """Of each sample [n, ...], as it multiplies one."""
    return values.std(dim=tuple(range(1, values.ndim)), keepdim=True)
