"""Early rejection: a batch is looked at once on its way, and samples that look hopeless are not finished.

After the first step that starts at or below a noise level the model's own estimate of the clean latents (see
`models.estimate`) is decoded for a few frames, and scored. What scores too low is left out of the denoiser from then on; the
pipeline itself keeps its batch, of which the rest of those rows is never used.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.errors import UserError
from models.decoding import glimpse
from models.estimate import clean_estimate, noise_levels
from models.parallel.degrees import Degrees

if TYPE_CHECKING:
    from torch import Tensor

    from models.evaluations import Evaluations
    from models.families import Family
    from models.loading import GeneratorRef
    from models.plan import SamplerPlan

KEY = "sampler.early_reject"
SIZES = 8
"""Sizes that a batch may go on at: its eighths. What is made for each size, such as a plan of a kernel, is made for few."""


def smaller(count: int, batch_size: int) -> int:
    """The size at which `count` samples of a batch of `batch_size` go on, 0 for none: the next of its eighths."""
    part = math.ceil(batch_size / SIZES)
    return min(batch_size, math.ceil(count / part) * part)


def check_early(family: Family | None, ref: GeneratorRef, plan: SamplerPlan) -> None:
    """Raise a UserError that names the key where samples of this generator cannot be stopped on their way."""
    if family is None:
        raise UserError(f"{KEY}: not with a pipeline that runs whole, of which no step is seen; remove it")
    for key, is_plain, why in (
        ("layout.parallel", ref.parallel == Degrees(), "each rank would have to come to the same decisions"),
        ("layout.compile", not ref.compile, "a denoiser would be compiled for each size of the batch"),
        ("layout.offload", ref.offload == "none", "decoder and denoiser would take each other's place at each look"),
        ("sampler.dualparal", plan.blocks is None, "blocks of frames are at different steps there"),
    ):
        if not is_plain:
            raise UserError(f"{KEY}: not with {key}, for {why}; remove one of the two")


def check_look(scheduler: Any, plan: SamplerPlan, at: float, sets_sigmas: bool) -> None:
    """The same where a fresh scheduler of the plan has no step to look at; `sets_sigmas`: it follows those of the pipeline,
    which are not known yet.
    """
    if scheduler.order != 1:
        raise UserError(
            f"{KEY}: {type(scheduler).__name__} takes {scheduler.order} turns a step; choose scheduler unipc, dpmpp or euler"
        )
    if not sets_sigmas:
        scheduler.set_timesteps(plan.num_inference_steps)
        look_step(scheduler, at)


def look_step(scheduler: Any, at: float) -> int:
    """The first step that starts at or below noise level `at`, of a scheduler whose timesteps are set.

    UserError where none does that has a step after it.
    """
    levels = noise_levels(scheduler)
    found = np.flatnonzero(levels <= at)
    if not len(found) or found[0] + 1 >= len(levels):
        before = f"{levels[-2]:.3g}" if len(levels) > 1 else "none, its only step being the last"
        raise UserError(
            f"{KEY}.at: none of the {len(levels)} steps but the last starts at a noise level of {at:g} or less; give at least"
            f" {before}"
        )
    return int(found[0])


class Early:
    """What a batch is looked at by, and what came of it. One for a call of `Generator.sample`.

    Args:
        at: noise level at or below which it is looked at, 1 for pure noise.
        frames: latent frames that are decoded, the first ones; of an image all there is.
        below: float64 [n], the score below which each sample is stopped; -inf stops none. What is padded to the batch beyond
            these n is neither looked at nor kept.
        spared: bool [n], samples that go on whatever they score.
        look: scores float64 [n] of clips uint8 [n, frames, height, width, 3] of the samples `start` to `start + n`, called
            as look(clips, start). One that is no finite number stops nothing.

    Attributes: `scores` float64 [n] and `stopped` bool [n], of the samples looked at so far; `evaluations` int64 [n], of the
    denoiser for a sample by the time it was stopped, 0 where it was not; `sizes` int64 [n], the batch that a sample ended in
    where that is smaller than the one it began in, else 0; `step`, the number of steps that a stopped one took; `seconds` of
    all looks.
    """

    def __init__(
        self,
        at: float,
        frames: int,
        below: np.ndarray,
        spared: np.ndarray,
        look: Callable[[np.ndarray, int], np.ndarray],
    ) -> None:
        self.at, self.frames, self.below, self.spared, self.look = at, frames, below, spared, look
        self.scores, self.stopped = np.zeros(0), np.zeros(0, bool)
        self.evaluations, self.sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.step, self.seconds = 0, 0.0
        self.followers: list[Callable[[Tensor], None]] = []
        """Told which rows [m] of the batch go on: what keeps something of each row inside of the denoiser."""

    @contextmanager
    def watching(
        self,
        scheduler: Any,
        evaluations: Evaluations,
        rows: int,
        decode: Callable[[Tensor], np.ndarray],
    ) -> Iterator[None]:
        """Around one call of a pipeline for `rows` samples, whose denoisers are those that `evaluations` counts.

        `decode` makes clips of clean latents as the pipeline holds them.
        """
        from models.accelerate.stack import forwarding

        batch = _Batch(self, scheduler, rows, decode, lambda: evaluations.rows // rows)
        self.followers.clear()
        with ExitStack() as undo:
            for denoiser in evaluations.modules:
                undo.enter_context(forwarding(denoiser, batch.narrowed(denoiser.forward)))
            scheduler.step = batch.stepping(scheduler.step)  # it lives for one call
            yield
        if not batch.looked:
            raise RuntimeError(f"{KEY}: {type(scheduler).__name__} took no step that could be looked at")


def looking(
    early: Early | None,
    family: Family,
    pipe: Any,
    noise: tuple[int, ...],
    media: tuple[int, int, int],
    evaluations: Evaluations,
) -> AbstractContextManager[None]:
    """Around one call of the pipeline from noise of this shape to media of height, width and number of frames."""
    if early is None:
        return nullcontext()
    decode = partial(glimpse, family, pipe, noise[1:], media, early.frames)
    return early.watching(pipe.scheduler, evaluations, noise[0], decode)


class _Batch:
    """One batch on its way: which of its rows the denoiser is still asked for."""

    def __init__(
        self,
        early: Early,
        scheduler: Any,
        rows: int,
        decode: Callable[[Tensor], np.ndarray],
        evaluated: Callable[[], int],
    ) -> None:
        self.early, self.scheduler, self.count, self.decode, self.evaluated = early, scheduler, rows, decode, evaluated
        self.kept: Tensor | None = None
        self.looked, self._step = False, 0
        self._shape: tuple[int, ...] = ()

    def stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` of the scheduler, with a look at the estimate when it is time."""
        signature = inspect.signature(step)

        @wraps(step)  # pipelines ask which arguments it takes
        def looking(*args: Any, **kwargs: Any) -> Any:
            if self._step == 0:
                self.early.step = look_step(self.scheduler, self.early.at) + 1
            if self._step + 1 == self.early.step:
                given = signature.bind(*args, **kwargs).arguments
                self._look(clean_estimate(self.scheduler, self._step, given["model_output"], given["sample"]))
            self._step += 1
            return step(*args, **kwargs)

        return looking

    def narrowed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a denoiser, asked for the kept rows alone. Of the others its answer is zero."""
        import torch

        def ask(*args: Any, **kwargs: Any) -> Any:
            if self.kept is None:
                made = forward(*args, **kwargs)
                self._shape = tuple(made[0].shape[1:])
                return made
            first: Tensor = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            branches = range(len(first) // self.count)  # of guidance, one after the other in one batch
            rows = torch.cat([self.kept + self.count * branch for branch in branches])
            whole = first.new_zeros(len(first), *self._shape)
            if len(rows) == 0:
                return (whole,)
            made = forward(
                *(_of(rows, value, len(first)) for value in args),
                **{name: _of(rows, value, len(first)) for name, value in kwargs.items() if name not in _NOT_BY_ROW},
                **{name: value for name, value in kwargs.items() if name in _NOT_BY_ROW},
            )
            return (whole.to(made[0].dtype).index_copy(0, rows, made[0]), *made[1:])

        return ask

    def _look(self, estimate: Tensor) -> None:
        import torch

        early, began = self.early, time.perf_counter()
        start = len(early.scores)
        part = slice(start, min(start + self.count, len(early.below)))
        seen = part.stop - part.start
        scores = np.asarray(early.look(self.decode(estimate[:seen]), start), dtype=np.float64)
        stopped = (scores < early.below[part]) & ~early.spared[part]
        alive = np.flatnonzero(~stopped)
        size = smaller(len(alive), self.count)
        if size < self.count:
            # Filled up with the first of them, whose answers are the same.
            filled = np.concatenate([alive, np.repeat(alive[:1], size - len(alive))])
            self.kept = torch.from_numpy(filled).to(estimate.device)
            for follow in early.followers:
                follow(self.kept)
        early.scores = np.concatenate([early.scores, scores])
        early.stopped = np.concatenate([early.stopped, stopped])
        early.sizes = np.concatenate([early.sizes, np.where(stopped | (size == self.count), 0, size)])
        early.evaluations = np.concatenate([early.evaluations, np.where(stopped, self.evaluated(), 0)])
        early.seconds += time.perf_counter() - began
        self.looked = True


_NOT_BY_ROW = ("img_ids", "txt_ids", "image_rotary_emb")
"""Arguments of denoisers that are shared by the rows of a batch, however many entries they have."""


def _of(rows: Tensor, value: Any, count: int) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows) if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {name: _of(rows, each, count) for name, each in value.items()}
    return value
