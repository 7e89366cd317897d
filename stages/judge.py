"""JudgeQuality: P(yes) for each question of a rubric, and the verdict that follows."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.errors import UserError
from models.facts import Score
from models.pack.marks import marks
from models.viewer import ViewerRef, load_viewer
from stages.asking import ask, parts_in
from stages.batch import Batch, jsons, load_json, size, texts
from stages.rubric import NO_PARTS, OVERALL, Rubric, decide
from stages.screen import PREFIX, ScreenQuality


@dataclass(frozen=True)
class JudgeQuality:
    """Scores what earlier stages left, and accepts what clears every threshold.

    Reads `frames`, `prompt` and what else questions quote (`negative_prompt`, `tags`, `extra`); appends to `scores`, sets
    `verdict` and `reasons`. A sample with an answer that is no finite number fails with `judge_failed`. To the facts of a
    prompt in `decomposed` it adds `p_yes`, a number each.

    Backend `call` imports `call` ('module:function'). The function takes the batch (see stages/batch.py; frames are uint8
    [n, T, H, W, 3]) and returns {name: n floats}, higher being better. A name that has a threshold in the spec takes part
    in the verdict, the others only score; the rubric plays no part.

    Backend `oracle` marks clips of the small world with 1 or 0 (models/pack/marks.py), for tests and benches: it looks at
    all frames, and a prompt outside the world's grammar fails with `judge_failed`.

    The other backends ask `model`, which computes here or is behind an endpoint; with a `screen`, of the samples that it
    has not settled.
    """

    rubric: Rubric
    model: ViewerRef | None = None
    backend: str = "transformers"
    call: str | None = None
    version: str | None = None
    thresholds: tuple[tuple[str, float], ...] = ()  # these replace the rubric's own
    facts: Score = "mean"  # how those of a prompt make one score
    num_frames: int = 8
    threads: int = 1
    screen: ScreenQuality | None = None

    name: ClassVar[str] = "judge"
    reads: ClassVar[tuple[str, ...]] = ("frames", "prompt", "scores", "verdict", "reasons")
    adds: ClassVar[tuple[str, ...]] = ("scores", "verdict", "reasons")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        if self.backend == "call":
            import_call(self.call or "")
        elif self.backend != "oracle":
            load_viewer(self._model, self.threads)

    def __call__(self, batch: Batch) -> Batch:
        failed = [""] * size(batch)
        decomposed: Batch = {}
        if self.backend in ("oracle", "call"):
            answers, failed = self._mark(batch) if self.backend == "oracle" else (self._call(batch), failed)
            rows = [{name: float(column[row]) for name, column in answers.items()} for row in range(size(batch))]
        else:
            rows, decomposed = self._ask(batch)
        unsound = [[name for name, value in row.items() if not math.isfinite(value)] for row in rows]
        decisions = [("", []) if bad else self.decide(row) for row, bad in zip(rows, unsound, strict=True)]
        before = load_json(batch["scores"]) if "scores" in batch else [[]] * len(rows)
        scores = [
            old + [{"name": name, "value": value} for name, value in row.items() if math.isfinite(value)]
            for old, row in zip(before, rows, strict=True)
        ]
        errors = [
            why or (f"the judge's answer to {', '.join(bad)} is no finite number" if bad else "")
            for why, bad in zip(failed, unsound, strict=True)
        ]
        return {
            **batch,
            **decomposed,
            "scores": jsons(scores),
            "verdict": texts([verdict for verdict, _ in decisions]),
            "reasons": jsons([reasons for _, reasons in decisions]),
            "error": texts(errors),
            "error_type": texts(["judge_failed" if bad else "" for bad in unsound]),
        }

    def bars(self) -> dict[str, float]:
        """The thresholds in force."""
        spec = dict(self.thresholds)
        return spec if self.backend == "call" else self.rubric.thresholds(spec)

    def wants(self, batch: Batch) -> np.ndarray:
        """Which samples of a batch it is to be asked about, bool [n]: those that no screen has settled."""
        if self.screen is None:
            return np.ones(size(batch), dtype=bool)
        scores = [{item["name"]: item["value"] for item in row} for row in load_json(batch["scores"])]
        rows = zip(scores, parts_in(batch, self.rubric), strict=True)
        total = batch["frames"].shape[1]
        return np.array([self.screen.settle(row, total, parts) is None for row, parts in rows], dtype=bool)

    def settle(
        self, scores: Mapping[str, float], num_frames: int, parts: Mapping[str, str] = NO_PARTS
    ) -> tuple[str, list[str]] | None:
        """The verdict and its reasons that follow from answers that are known; None where one is missing."""
        if self.screen is not None and (settled := self.screen.settle(scores, num_frames, parts)):
            return settled
        if self.backend == "call":
            return self.decide(scores) if scores else None
        asked = [question.name for question in self.rubric.questions if question.asked(num_frames, parts)]
        return self.decide(scores) if all(name in scores for name in asked) else None

    def decide(self, scores: Mapping[str, float]) -> tuple[str, list[str]]:
        """The verdict that the judge's answers give, with its reasons."""
        bars = self.bars()
        if OVERALL in bars and OVERALL not in scores and any(each.name in scores for each in self.rubric.questions):
            scores = {**scores, OVERALL: self.rubric.overall(scores)}
        return decide(scores, bars)

    @property
    def _model(self) -> ViewerRef:
        if self.model is None:
            raise UserError(f"judge.model: is needed with judge.backend: {self.backend}")
        return self.model

    def _ask(self, batch: Batch) -> tuple[list[dict[str, float]], Batch]:
        """Each sample's score for each question that it was asked; and `decomposed` with answers, if that was asked."""
        known = self._screened(batch) if self._screen_is_same(batch) else None
        scores, answered = ask(self.rubric, self._model, batch, self.num_frames, self.facts, known)
        return scores, {"decomposed": jsons(answered)} if any(answered) else {}

    def _screen_is_same(self, batch: Batch) -> bool:
        """Whether the screen is this model, and was shown the same frames."""
        if self.screen is None or self.screen.model != self.model:
            return False
        total = batch["frames"].shape[1]
        return min(self.num_frames, total) == min(self.screen.num_frames, total)

    def _screened(self, batch: Batch) -> list[dict[str, float]]:
        """The screen's answers, by the names of its questions. Of a prompt's facts it left their score alone."""
        rows = load_json(batch["scores"]) if "scores" in batch else [[]] * size(batch)
        return [
            {item["name"].removeprefix(PREFIX): item["value"] for item in row if item["name"].startswith(PREFIX)}
            for row in rows
        ]

    def _mark(self, batch: Batch) -> tuple[dict[str, np.ndarray], list[str]]:
        """The oracle's marks, NaN where it has none, and for each row why."""
        total = batch["frames"].shape[1]
        asked = [question.name for question in self.rubric.questions if question.asked(total)]
        answers = {name: np.full(size(batch), math.nan) for name in asked}
        failed = [""] * size(batch)
        for row, (frames, prompt) in enumerate(zip(batch["frames"], batch["prompt"], strict=True)):
            try:
                found = marks(frames, str(prompt))
            except ValueError as error:
                failed[row] = str(error)
                continue
            for name in asked:
                answers[name][row] = found[name]
        return answers, failed

    def _call(self, batch: Batch) -> dict[str, np.ndarray]:
        answers = import_call(self.call or "")(batch)
        if not isinstance(answers, Mapping):
            raise UserError(f"judge.call: {self.call}: expected {{name: n floats}}, found {type(answers).__name__}")
        for name, values in answers.items():
            if np.ndim(values) != 1 or len(values) != size(batch):
                raise UserError(
                    f"judge.call: {self.call}: {name}: expected {size(batch)} floats, found {_shape(values)}"
                )
        for name, _ in self.thresholds:
            if name not in answers:
                raise UserError(
                    f"judge.thresholds.{name}: {self.call} gives no such score; it gives {', '.join(answers) or 'none'}"
                )
        return {str(name): _floats(values) for name, values in answers.items()}


def import_call(path: str, key: str = "judge.call") -> Callable[[Any], Any]:
    """The function that `module:function` names. Raises UserError, which begins with `key`, where there is none."""
    module, _, function = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}: {path}: cannot be imported ({error}); expected module:function") from error
    if not callable(found):
        raise UserError(f"{key}: {path}: is no function")
    return found


def _floats(values: Iterable[Any]) -> np.ndarray:
    """float64; what is no number becomes NaN."""
    column = []
    for value in values:
        try:
            column.append(float(value))
        except (TypeError, ValueError):
            column.append(math.nan)
    return np.array(column)


def _shape(values: Any) -> str:
    return f"shape {np.shape(values)}" if np.ndim(values) else type(values).__name__
