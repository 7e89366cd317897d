"""AcceptPrompts: of what was only encoded there is nothing to judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stages.batch import Batch, size, texts


@dataclass(frozen=True)
class AcceptPrompts:
    """Sets `verdict` to accepted."""

    name: ClassVar[str] = "accept"
    reads: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[tuple[str, ...]] = ("verdict",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        """Nothing is needed."""

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "verdict": texts(["accepted"] * size(batch))}
