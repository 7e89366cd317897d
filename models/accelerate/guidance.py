"""Classifier-free guidance with less, or other, work: a denoiser that answers a pipeline with the guided prediction.

The pipeline itself runs with guidance_scale 1 and asks once a step. From conditional prediction c and unconditional u, which
is evaluated only where somebody asks for it, the plain guide makes u + w (c - u); a technique is what it makes of a guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from models.accelerate.course import UNCONDITIONAL, Course
from models.families import DENOISERS

if TYPE_CHECKING:
    from torch import Tensor

Guide = Callable[["Tensor", Callable[[], "Tensor"]], "Tensor"]
"""The guided prediction [n, ...], of the conditional one and of how to come by the unconditional one."""


def plain(guidance_scale: float) -> Guide:
    def guide(c: Tensor, unconditional: Callable[[], Tensor]) -> Tensor:
        u = unconditional()
        return u + guidance_scale * (c - u)

    return guide


class Guided:
    """Stands in for a denoiser in its pipeline; whatever is asked of it but a prediction is the denoiser's answer.

    `negative`: embeddings [n, tokens, width] of the negative prompts. `counts`: all blocks of a branch that is evaluated are
    computed, and are counted here.
    """

    def __init__(self, denoiser: Any, guide: Guide, negative: Tensor, course: Course, counts: bool) -> None:
        self.denoiser, self.guide, self.negative, self.course = denoiser, guide, negative, course
        self.counts, self.blocks = counts, len(denoiser.blocks)  # before a technique stacks them

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, encoder_hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
        asked = False

        def unconditional() -> Tensor:
            nonlocal asked
            asked = True
            with self.course.on(UNCONDITIONAL):
                return self._evaluated(self.negative, arguments)

        made = self.guide(self._evaluated(encoder_hidden_states, arguments), unconditional)
        if not asked:
            self.course.plan(self.blocks)
        return (made,)

    def _evaluated(self, prompt_embeds: Tensor, arguments: dict[str, Any]) -> Tensor:
        # In guidance parallel each rank is asked for both and evaluates one.
        if self.counts and not (self.course.branches is not None and self.course.branch == UNCONDITIONAL):
            self.course.plan(self.blocks)
            self.course.compute(self.blocks)
        made: Tensor = self.denoiser(encoder_hidden_states=prompt_embeds, **arguments)[0]
        return made


@contextmanager
def guiding(pipe: Any, guide: Guide, negative: Tensor, course: Course, counts: bool) -> Iterator[None]:
    """Around one call of the pipeline, whose denoisers answer with the guided prediction; `counts` as `Guided`'s."""
    before = {name: denoiser for name in DENOISERS if (denoiser := getattr(pipe, name, None)) is not None}
    for name, denoiser in before.items():
        setattr(pipe, name, Guided(denoiser, guide, negative, course, counts))
    try:
        yield
    finally:
        for name, denoiser in before.items():
            setattr(pipe, name, denoiser)
