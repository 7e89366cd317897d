"""A batch on its way through the sampler, as techniques see it: where it is, what was computed, and what they keep.

There is one a call of the pipeline, so that nothing outlives its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from infra.errors import UserError
from infra.telemetry import log

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = "layout.max_cache_bytes"
CONDITIONAL, UNCONDITIONAL = "cond", "uncond"
"""Branches of guidance, as diffusers' pipelines name them to `cache_context`."""


class Follower(Protocol):
    def keep(self, rows: Tensor) -> None:
        """Of what is kept of each row, that of `rows` [m] alone is kept, in that order."""


class Course:
    """Args:
    rows: samples of the batch.
    scheduler: the pipeline's, whose timesteps are set by the time of the first step.
    techniques: names of those that are to skip something.
    limit: bytes that they may keep at a time, None for no bound.
    group: ranks that compute the same blocks together, None for one; what is decided by data is rank 0's decision.
    branches: the two ranks of guidance parallel, each of which counts what it computes.
    """

    def __init__(
        self,
        rows: int,
        scheduler: Any,
        techniques: tuple[str, ...] = (),
        limit: int | None = None,
        group: Any = None,
        branches: Any = None,
    ) -> None:
        self.rows, self.scheduler, self.techniques = rows, scheduler, techniques
        self.limit, self.group, self.branches = limit, group, branches
        self.step, self.branch = -1, ""
        self.planned, self.computed = np.zeros(rows), np.zeros(rows)
        self.followers: list[Follower] = []
        """What keeps something of each row that the denoiser is asked for."""
        self.peak = 0
        self._held = 0
        self._alive = np.arange(rows)
        self._skipping: set[str] = set()

    @property
    def steps(self) -> int:
        return len(self.scheduler.timesteps)

    @property
    def sigma(self) -> float:
        """Noise level of the step, 1 for pure noise where the scheduler is a flow's."""
        return float(self.scheduler.sigmas[self.step])

    def is_margin(self, warmup: int, cooldown: int) -> bool:
        """Is this one of the first `warmup` or of the last `cooldown` steps?"""
        return self.step < warmup or self.step >= self.steps - cooldown

    @contextmanager
    def following(self, denoiser: Any) -> Iterator[None]:
        """Learn the step and the branch from what the pipeline tells the denoiser before each call."""
        told: Callable[..., Any] | None = getattr(denoiser, "cache_context", None)
        if told is None:
            raise RuntimeError(f"{type(denoiser).__name__} has no cache_context, by which techniques know the step")

        @contextmanager
        def context(name: str, **where: Any) -> Iterator[None]:
            self.step += name == CONDITIONAL
            with self.on(name), told(name, **where):
                yield

        denoiser.cache_context = context
        try:
            yield
        finally:
            del denoiser.cache_context

    @contextmanager
    def on(self, branch: str) -> Iterator[None]:
        """What is asked of the denoiser inside belongs to this branch."""
        before, self.branch = self.branch, branch
        try:
            yield
        finally:
            self.branch = before

    def plan(self, blocks: float) -> None:
        """So many block evaluations of each sample that goes on are in the plan without techniques."""
        self.planned[self._alive] += blocks

    def compute(self, blocks: float, rows: Tensor | None = None) -> None:
        """So many were computed, of the samples at `rows`, or of all that go on."""
        self.computed[self._alive if rows is None else self._alive[rows.cpu().numpy()]] += blocks

    def keep(self, rows: Tensor) -> None:
        """From now on the denoiser is asked for these rows [m] alone, in that order; one may be there twice."""
        for follower in self.followers:
            follower.keep(rows)
        self._alive = self._alive[rows.cpu().numpy()]

    def skip(self, technique: str) -> None:
        """It has skipped something."""
        self._skipping.add(technique)

    def hold(self, nbytes: int) -> None:
        """So many more bytes are kept. UserError where that is more than the limit."""
        self._held += nbytes
        self.peak = max(self.peak, self._held)
        if self.limit is not None and self._held > self.limit:
            raise UserError(
                f"{LIMIT}: {' and '.join(self.techniques)} want more than {self.limit} bytes for a batch of {self.rows};"
                " raise it, or use a smaller layout.batch_size or what keeps less (taylorseer: keep: last)"
            )

    def agreed(self, wanted: Tensor) -> Tensor:
        """What rank 0 of the group wants: a decision taken from data is taken once."""
        if self.group is None:
            return wanted
        import torch.distributed as dist

        said = wanted.byte()
        dist.broadcast(said, dist.get_global_rank(self.group, 0), group=self.group)
        return said.bool()

    def facts(self) -> list[dict[str, Any]]:
        """What was saved of each sample, at the end: `block_evaluations` of the plan without techniques, the share of them
        that was `skipped`, and `cache_bytes` that were kept for the sample at the peak. Techniques that skipped nothing in
        the whole batch are logged.
        """
        idle = [name for name in self.techniques if name not in self._skipping]
        if idle:
            log().warning("a technique skipped nothing in a whole batch", techniques=idle, samples=self.rows)
        planned, computed = self._over_branches()
        return [
            {
                "block_evaluations": round(float(whole)),
                "skipped": round(1 - float(part) / float(whole), 6) if whole else 0.0,
                "cache_bytes": self.peak // self.rows,
            }
            for whole, part in zip(planned, computed, strict=True)
        ]

    def _over_branches(self) -> tuple[np.ndarray, np.ndarray]:
        if self.branches is None:
            return self.planned, self.computed
        import torch
        import torch.distributed as dist

        device = "cpu" if dist.get_backend(self.branches) == "gloo" else "cuda"
        counts = torch.from_numpy(np.stack([self.planned, self.computed])).to(device)
        dist.all_reduce(counts, group=self.branches)
        planned, computed = counts.cpu().numpy()
        return planned, computed


class Cache:
    """Tensors [n, ...] that a technique keeps, by key. What they take is the course's to bound.

    `whole`: kept outside of the denoiser, of all rows of the pipeline's batch, whichever of them go on.
    """

    def __init__(self, course: Course, whole: bool = False) -> None:
        self.course = course
        self._kept: dict[Any, Tensor] = {}
        if not whole:
            course.followers.append(self)

    def __contains__(self, key: Any) -> bool:
        return key in self._kept

    def __getitem__(self, key: Any) -> Tensor:
        return self._kept[key]

    def __setitem__(self, key: Any, value: Tensor) -> None:
        before = self._kept.get(key)
        self.course.hold(value.nbytes - (0 if before is None else before.nbytes))
        self._kept[key] = value

    def put(self, key: Any, value: Tensor, rows: Tensor | None) -> None:
        """Keep `value`, of the samples at `rows` alone or of all; those of the others stay what they are."""
        if rows is None:
            self[key] = value
        else:
            self._kept[key].index_copy_(0, rows, value)

    def keep(self, rows: Tensor) -> None:
        for key, value in self._kept.items():
            self[key] = value.index_select(0, rows)


class Savings:
    """What was saved of each sample, batch after batch: dictionaries as `Course.facts` has them."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []
