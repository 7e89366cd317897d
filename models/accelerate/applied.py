"""A plan's techniques around one call of a pipeline: applied before it, and gone after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from models.accelerate.course import Course, Savings
from models.accelerate.registry import TECHNIQUES, configs

if TYPE_CHECKING:
    from torch import Tensor

    from models.parallel.layout import Layout
    from models.plan import SamplerPlan


@contextmanager
def accelerated(
    pipe: Any,
    plan: SamplerPlan,
    arguments: Mapping[str, Any],
    rows: int,
    *,
    layout: Layout | None = None,
    limit: int | None = None,
    savings: Savings | None = None,
    has_teacher: bool = False,
    followers: list[Callable[[Tensor], None]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Around one call of the pipeline for `rows` samples. Yields those arguments of it that are to be other ones.

    What was saved of each sample is added to `savings` at the end. `has_teacher`: its denoiser may not be asked at all.
    `followers` is added to: who is to be told which rows of the batch go on, where not all do.
    RuntimeError where the pipeline went past what was applied.
    """
    if not plan.accelerate:
        yield {}
        return
    from models.accelerate.guidance import guiding, plain
    from models.accelerate.stack import blocks_of
    from models.parallel.layout import denoisers_of

    wanted = [(TECHNIQUES[config.name], config) for config in configs(plan)]
    course = Course(
        rows,
        pipe.scheduler,
        tuple(config.name for row, config in wanted if row.saves),
        limit,
        group=None if layout is None else layout.tensor,
        branches=None if layout is None else layout.branches,
    )
    if followers is not None:
        followers.append(course.keep)
    counts = all(row.decides != "blocks" for row, _ in wanted)
    changed: dict[str, Any] = {}
    guide = None
    with ExitStack() as undo:
        denoisers = denoisers_of(pipe)
        for denoiser in denoisers:
            blocks_of(denoiser)
            undo.enter_context(course.following(denoiser))
        for row, config in wanted:
            if row.decides == "guidance":
                guide = row.apply(guide or plain(plan.guidance_scale), config, course)
        if guide is not None:
            changed["guidance_scale"] = 1.0
            undo.enter_context(guiding(pipe, guide, arguments["negative_prompt_embeds"], course, counts))
        for denoiser in denoisers:
            for row, config in wanted:
                if row.decides == "blocks":
                    undo.enter_context(row.apply(denoiser, config, course))
        yield changed
        if not course.computed.all() and not has_teacher:
            raise RuntimeError(
                f"sampler.accelerate: {type(pipe).__name__} asked its denoisers for nothing that techniques could see"
            )
    if savings is not None:
        savings.facts += course.facts()
