"""MagCache: steps are skipped as long as the residual's magnitude is known to change little.

Ma et al. 2025, arXiv 2506.09045. The residual of all blocks, r = h - h0, shrinks from step to step by a ratio that depends on
the model and hardly on the prompt. With that ratio g of each step, measured once by `calibrate`, over the steps since r was
computed:

    G = product of g,   E = sum of |1 - G|,   skip while E < threshold and at most max_skips in a row,   then   h = h0 + r'

Nothing is decided by a sample's own data. None of the ratios is shipped: they are the checkpoint's, its scheduler's and its
shift's, and are given as a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from models.accelerate.course import Cache, Course
from models.accelerate.settings import SettingError, setting

if TYPE_CHECKING:
    from torch import Tensor

    from models.accelerate.stack import Given, Stack


@dataclass(frozen=True)
class MagCache:
    """Skip all blocks while the residual's magnitude is known to change little."""

    name: ClassVar[str] = "magcache"

    ratios: tuple[float, ...] = setting(
        (),
        "Of each step's residual magnitude to that of the step before, as models.accelerate.magcache.calibrate measures them;"
        " spread over another number of steps.",
    )
    threshold: float = setting(0.06, "Accumulated error below which steps are skipped; 0 skips none.", least=0)
    max_skips: int = setting(3, "Most steps skipped in a row.", least=0)
    warmup: int = setting(3, "First steps at which all is computed.", least=1)
    cooldown: int = setting(0, "Last steps at which all is computed.", least=0)

    def __post_init__(self) -> None:
        if not self.ratios:
            raise SettingError(
                "ratios",
                "found none, and each checkpoint has its own; measure them by models.accelerate.magcache.calibrate",
            )
        if not all(isinstance(ratio, (int, float)) and 0 < ratio < 10 for ratio in self.ratios):
            raise SettingError("ratios", f"expected numbers above 0 and below 10, found {list(self.ratios)!r}")
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))


@contextmanager
def apply(denoiser: Any, config: MagCache, course: Course) -> Iterator[None]:
    """Around one call of the pipeline of `denoiser`."""
    from models.accelerate.stack import stacked

    with stacked(denoiser, course, _Policy(config, Cache(course))):
        yield


class _Policy:
    def __init__(self, config: MagCache, cache: Cache) -> None:
        self.config, self.cache = config, cache
        self.since: dict[str, tuple[int, float, float, int]] = {}
        """Of each branch: the last step that was looked at, G, E, and how many were skipped in a row."""

    def __call__(self, stack: Stack, hidden: Tensor, given: Given) -> Tensor:
        course, config = stack.course, self.config
        if course.branch in self.cache and not course.is_margin(config.warmup, config.cooldown):
            seen, product, error, skipped = self.since[course.branch]
            product *= float(np.prod([self._ratio(step, course.steps) for step in range(seen + 1, course.step + 1)]))
            error += abs(1 - product)
            if error < config.threshold and skipped < config.max_skips:
                self.since[course.branch] = (course.step, product, error, skipped + 1)
                course.skip(config.name)
                return hidden + self.cache[course.branch]
        out = stack.compute(hidden, given)
        self.cache[course.branch] = out - hidden
        self.since[course.branch] = (course.step, 1.0, 0.0, 0)
        return out

    def _ratio(self, step: int, steps: int) -> float:
        known = len(self.config.ratios)
        return self.config.ratios[round(step * (known - 1) / max(1, steps - 1))]


def calibrate(denoiser: Any, sample: Callable[[], object]) -> tuple[float, ...]:
    """The ratios of a denoiser, one a step, the first 1: mean over tokens, samples and branches.

    `sample` denoises one batch with it, in one call of its pipeline, by a plan of no technique whose steps, shift and
    guidance are those of the plan that the ratios are for. They change little from prompt to prompt; a batch is plenty.
    """
    from models.accelerate.stack import stacked

    course = Course(1, None)
    recorder = _Recorder()
    with course.following(denoiser), stacked(denoiser, course, recorder, counts=False):
        sample()
    if not recorder.found:
        raise RuntimeError("calibrate: the denoiser was not asked twice; `sample` has to denoise by this very pipeline")
    return (1.0, *(float(np.mean(recorder.found[step])) for step in sorted(recorder.found)))


class _Recorder:
    """Norms of the residual of each token, from step to step."""

    def __init__(self) -> None:
        self.found: dict[int, list[float]] = {}
        self._before: dict[str, Tensor] = {}

    def __call__(self, stack: Stack, hidden: Tensor, given: Given) -> Tensor:
        out = stack.compute(hidden, given)
        norms = (out - hidden).float().norm(dim=-1)
        before = self._before.get(stack.course.branch)
        if before is not None:
            self.found.setdefault(stack.course.step, []).append(float((norms / before).mean()))
        self._before[stack.course.branch] = norms
        return out
