"""JudgeQuality: P(yes) for each question of a rubric, and the verdict that follows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.errors import UserError
from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
from stages.batch import Batch, jsons, load_json, size, texts
from stages.rubric import Rubric


@dataclass(frozen=True)
class JudgeQuality:
    """Scores what earlier stages left, and accepts what clears every threshold.

    Reads `frames` and `prompt`; appends to `scores`, sets `verdict` and `reasons`. A sample whose answer is no probability
    fails with `judge_failed`. Backend `call` imports `call` ('module:function'), which takes the batch and returns
    {question: [n] floats}; its names may be others than the rubric's, and those that have no threshold only score.
    """

    rubric: Rubric
    model: MultimodalRef | None = None
    backend: str = "transformers"
    call: str | None = None
    version: str | None = None
    thresholds: tuple[tuple[str, float], ...] = ()  # these replace the rubric's own
    num_frames: int = 8
    threads: int = 1

    name: ClassVar[str] = "JudgeQuality"
    reads: ClassVar[tuple[str, ...]] = ("frames", "prompt", "scores", "verdict", "reasons")
    adds: ClassVar[tuple[str, ...]] = ("scores", "verdict", "reasons")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        if self.backend == "call":
            import_call(self.call or "")
        else:
            import torch

            torch.set_num_threads(self.threads)
            load_multimodal(self._model)

    def __call__(self, batch: Batch) -> Batch:
        answers = self._call(batch) if self.backend == "call" else self._ask(batch)
        bars = self.bars()
        n = size(batch)
        scores, verdicts, reasons = load_json(batch["scores"]) if "scores" in batch else [[] for _ in range(n)], [], []
        errors = list(batch["error"]) if "error" in batch else [""] * n
        error_types = list(batch["error_type"]) if "error_type" in batch else [""] * n
        for row in range(n):
            values = {name: float(column[row]) for name, column in answers.items()}
            unsound = [name for name, value in values.items() if not np.isfinite(value)]
            if unsound:
                error_types[row] = "judge_failed"
                errors[row] = f"the judge's answer to {', '.join(unsound)} is not a finite number"
                values = {}
            scores[row] = scores[row] + [{"name": name, "value": value} for name, value in values.items()]
            verdict, why = decide(values, bars)
            verdicts.append("" if unsound else verdict)
            reasons.append(why)
        return batch | {
            "scores": jsons(scores),
            "verdict": texts(verdicts),
            "reasons": jsons(reasons),
            "error": texts(errors),
            "error_type": texts(error_types),
        }

    def bars(self) -> dict[str, float]:
        """The thresholds in force."""
        own = {} if self.backend == "call" else self.rubric.thresholds()
        return own | dict(self.thresholds)

    @property
    def _model(self) -> MultimodalRef:
        if self.model is None:
            raise UserError("judge.model: is needed with judge.backend: transformers")
        return self.model

    def _ask(self, batch: Batch) -> dict[str, np.ndarray]:
        frames = evenly_spaced(batch["frames"], self.num_frames)
        total = batch["frames"].shape[1]
        asked = [question for question in self.rubric.questions if question.asked(total)]
        questions = [[question.format(prompt, total) for question in asked] for prompt in batch["prompt"]]
        p_yes = load_multimodal(self._model).p_yes(frames, questions)
        return {question.name: p_yes[:, column] for column, question in enumerate(asked)}

    def _call(self, batch: Batch) -> dict[str, np.ndarray]:
        answers = import_call(self.call or "")(batch)
        if not isinstance(answers, Mapping):
            raise TypeError(
                f"judge.call {self.call}: expected {{question: [n] floats}}, found {type(answers).__name__}"
            )
        columns = {}
        for name, values in answers.items():
            column = _floats(values)
            if column.shape != (size(batch),):
                raise ValueError(
                    f"judge.call {self.call}: {name}: expected {size(batch)} floats, found shape {column.shape}"
                )
            columns[str(name)] = column
        return columns


def decide(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> tuple[str, list[str]]:
    """The verdict of a sample, 'accepted' or 'rejected', and a reason for each threshold that it misses.

    A threshold whose question was not asked (motion, of an image) is not missed.
    """
    reasons = [
        f"{name} {scores[name]:.2f} < {bar:g}"
        if f"{scores[name]:.2f}" != f"{bar:.2f}"
        else f"{name} {scores[name]:.6f} < {bar:g}"
        for name, bar in thresholds.items()
        if name in scores and scores[name] < bar
    ]
    return ("rejected" if reasons else "accepted"), reasons


def import_call(path: str) -> Callable[[Batch], Any]:
    """The function that `module:function` names. Raises UserError where there is none."""
    module, _, function = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"judge.call: {path}: cannot be imported ({error}); expected module:function") from error
    if not callable(found):
        raise UserError(f"judge.call: {path}: is no function")
    return found


def _floats(values: Any) -> np.ndarray:
    """float64; what is no number becomes NaN."""
    column = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            column[row] = float(value)
        except (TypeError, ValueError):
            column[row] = np.nan
    return column
