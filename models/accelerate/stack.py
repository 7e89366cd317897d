"""A denoiser's blocks as one module, which computes some of them for some of the samples.

For the time of a pipeline's call it stands in the place of the denoiser's list of blocks; before and after them the denoiser
does what it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.accelerate.course import Course

Given = tuple[Any, ...]
"""What a block takes beside hidden states: for Wan text [n, tokens, width], the projected timestep, and rotary embeddings."""

PARTS = ("attn1", "attn2", "ffn")
"""Of a block: self-attention, cross-attention, feed-forward."""


class Policy(Protocol):
    def __call__(self, stack: Stack, hidden: Tensor, given: Given) -> Tensor:
        """Hidden states [n, tokens, width] after the last block, of those before the first one."""


class Stack(nn.Module):
    """`blocks` under a policy; without one all of them are computed. `counts`: by whole blocks, and not by parts."""

    def __init__(self, blocks: nn.ModuleList, course: Course, policy: Policy | None, counts: bool = True) -> None:
        super().__init__()
        self.blocks, self.course, self.policy, self.counts = blocks, course, policy, counts

    def forward(self, hidden: Tensor, *given: Any) -> Tensor:
        self.course.plan(len(self.blocks))
        return self.compute(hidden, given) if self.policy is None else self.policy(self, hidden, given)

    def compute(self, hidden: Tensor, given: Given, blocks: slice = slice(None), rows: Tensor | None = None) -> Tensor:
        """Hidden states after these blocks, of the samples at `rows` or of all.

        All are computed as they would be without techniques: to the bit.
        """
        if rows is not None:
            given = tuple(_of(rows, value, len(hidden)) for value in given)
            hidden = hidden.index_select(0, rows)
        part = self.blocks[blocks]
        for block in part:
            hidden = block(hidden, *given)
        if self.counts:
            self.course.compute(len(part), rows)
        return hidden

    def compute_where(
        self, wanted: Tensor, hidden: Tensor, given: Given, blocks: slice, otherwise: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of all samples, and which rows were computed, None for all of them.

        Computed are those `wanted`, bool [n]; of the others they are what `otherwise` says.
        """
        wanted = self.course.agreed(wanted)
        rows = wanted.nonzero().flatten()
        if len(rows) == len(wanted):
            return self.compute(hidden, given, blocks), None
        made = otherwise()
        if len(rows):
            made = made.index_copy(0, rows, self.compute(hidden, given, blocks, rows))
        return made, rows


@contextmanager
def stacked(denoiser: Any, course: Course, policy: Policy | None, counts: bool = True) -> Iterator[None]:
    """The denoiser's blocks under a policy, inside."""
    blocks = blocks_of(denoiser)
    denoiser.blocks = nn.ModuleList([Stack(blocks, course, policy, counts)])
    try:
        yield
    finally:
        denoiser.blocks = blocks


Answer = Callable[[int, str, Callable[[], Tensor]], Tensor]
"""What a part gives: of the block's number, the part's name, and how to compute it."""


@contextmanager
def parts_answered(denoiser: Any, course: Course, answer: Answer) -> Iterator[None]:
    """Each part of each block asks `answer` for its output, inside. A part computed counts as a third of its block."""

    def asks(block: int, part: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(*args: Any, **kwargs: Any) -> Tensor:
            course.compute(1 / len(PARTS))
            return forward(*args, **kwargs)

        return lambda *args, **kwargs: answer(block, part, lambda: compute(*args, **kwargs))

    with ExitStack() as undo:
        for at, block in enumerate(blocks_of(denoiser)):
            for part in PARTS:
                module = getattr(block, part, None)
                if module is None:
                    raise RuntimeError(f"block {at} of {type(denoiser).__name__} has no {part} to answer for")
                undo.enter_context(forwarding(module, asks(at, part, module.forward)))
        undo.enter_context(stacked(denoiser, course, None, counts=False))
        yield


def blocks_of(denoiser: Any) -> nn.ModuleList:
    """RuntimeError where it has no list of them."""
    blocks = getattr(denoiser, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
        raise RuntimeError(f"{type(denoiser).__name__} has no list of blocks named `blocks`, so nothing can be skipped")
    return blocks


def change(new: Tensor, old: Tensor) -> Tensor:
    """|new - old| over |old| of each sample, both in L1: float32 [n]. Not a number where both are zero."""
    distance = (new.float() - old.float()).abs().flatten(1).mean(1)
    return distance / old.float().abs().flatten(1).mean(1)


def all_rows(hidden: Tensor) -> Tensor:
    return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)


@contextmanager
def forwarding(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes by `forward`, inside."""
    before = module.__dict__.get("forward")  # offloading sets one
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _of(rows: Tensor, value: Any, count: int) -> Any:
    return value.index_select(0, rows) if isinstance(value, Tensor) and len(value) == count else value
