"""ScreenQuality: the first tier of a cascade of judges, which settles what it is sure of (Viola and Jones 2001)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from models.facts import Score
from models.viewer import ViewerRef, load_viewer
from stages.asking import ask, parts_in
from stages.batch import Batch, jsons, load_json, size, texts
from stages.rubric import NO_PARTS, Rubric, decide

PREFIX = "screen_"
"""Before the name of a question in the scores: what the screen answered."""


@dataclass(frozen=True)
class ScreenQuality:
    """Asks a cheaper model the rubric's questions: a sample with an answer below `reject` is rejected, one with all answers
    at or above `accept` needs no judge. None accepts nothing.

    Reads `frames` and `prompt`; appends screen_<question> to `scores`, sets `verdict` and `reasons`. An undecided sample is
    left accepted, for the judge to decide; one with an answer that is no finite number is undecided too.
    """

    rubric: Rubric
    model: ViewerRef
    reject: float = 0.1
    accept: float | None = None
    facts: Score = "mean"  # as in JudgeQuality
    num_frames: int = 4
    threads: int = 1

    name: ClassVar[str] = "screen"
    reads: ClassVar[tuple[str, ...]] = ("frames", "prompt", "scores", "verdict", "reasons")
    adds: ClassVar[tuple[str, ...]] = ("scores", "verdict", "reasons")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        load_viewer(self.model, self.threads)

    def __call__(self, batch: Batch) -> Batch:
        found, _ = ask(self.rubric, self.model, batch, self.num_frames, self.facts)
        parts = parts_in(batch, self.rubric)
        before = load_json(batch["scores"]) if "scores" in batch else [[]] * size(batch)
        scores, settled = [], []
        for row, old in enumerate(before):
            own = {PREFIX + name: p for name, p in found[row].items() if math.isfinite(p)}
            scores.append(old + [{"name": name, "value": value} for name, value in own.items()])
            settled.append(self.settle(own, batch["frames"].shape[1], parts[row]) or ("accepted", []))
        return batch | {
            "scores": jsons(scores),
            "verdict": texts([verdict for verdict, _ in settled]),
            "reasons": jsons([reasons for _, reasons in settled]),
        }

    def settle(
        self, scores: Mapping[str, float], num_frames: int, parts: Mapping[str, str] = NO_PARTS
    ) -> tuple[str, list[str]] | None:
        """The verdict and its reasons that follow from the screen's answers among `scores`; None where it is not sure."""
        asked = [PREFIX + question.name for question in self.rubric.questions if question.asked(num_frames, parts)]
        verdict, reasons = decide(scores, dict.fromkeys(asked, self.reject))
        if reasons:
            return verdict, reasons
        if asked and self.accept is not None and all(scores.get(name, -1) >= self.accept for name in asked):
            return "accepted", []
        return None
