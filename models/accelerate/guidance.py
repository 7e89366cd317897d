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

    `negative`: embeddings [n, tokens, width] of the negative prompts. `blocks`: how many the denoiser has.
    """

    def __init__(self, denoiser: Any, guide: Guide, negative: Tensor, course: Course, blocks: int) -> None:
        self.denoiser, self.guide, self.negative, self.course = denoiser, guide, negative, course
        self.blocks_saved = blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def __call__(self, encoder_hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
        asked = False

        def unconditional() -> Tensor:
            nonlocal asked
            asked = True
            with self.course.on(UNCONDITIONAL):
                made: Tensor = self.denoiser(encoder_hidden_states=self.negative, **arguments)[0]
            return made

        conditional = self.denoiser(encoder_hidden_states=encoder_hidden_states, **arguments)[0]
        made = self.guide(conditional, unconditional)
        if not asked:
            self.course.plan(self.blocks_saved)
        return (made,)


@contextmanager
def guiding(pipe: Any, guide: Guide, negative: Tensor, course: Course) -> Iterator[None]:
    """Around one call of the pipeline, whose denoisers answer with the guided prediction."""
    before = {name: denoiser for name in DENOISERS if (denoiser := getattr(pipe, name, None)) is not None}
    for name, denoiser in before.items():
        setattr(pipe, name, Guided(denoiser, guide, negative, course, len(denoiser.blocks)))
    try:
        yield
    finally:
        for name, denoiser in before.items():
            setattr(pipe, name, denoiser)
