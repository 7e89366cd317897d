"""prompts: expanded prompts and their text embeddings, each distinct text once; nothing is sampled.

For distillation without data, where the student makes its own (DMD2, arXiv:2405.14867; Self-Forcing, arXiv:2506.08009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.recipes import synthetic
from stages.accept import AcceptPrompts
from stages.batch import Stage

if TYPE_CHECKING:
    from pipelines.resolve import Resolved


def generating(run: Resolved) -> tuple[Stage, ...]:
    """The stage that encodes."""
    return (synthetic.encoding(run),)


def judging(run: Resolved) -> tuple[Stage, ...]:
    """Every prompt that can be encoded is accepted."""
    return (AcceptPrompts(), run.writing())
