"""How much of its quality a cheaper plan may lose: the budget, and what a plan lost beside another on the same samples."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from infra.errors import UserError
from models.pack.train.intervals import bootstrap
from pipelines.sections import Section

Measure = Literal["accuracy", "judge", "psnr"]
MEASURES: tuple[Measure, ...] = ("accuracy", "judge", "psnr")
KEY = "--budget"
LEAST = 4
"""Samples."""
ROUNDING = 1e-9


class QualityBudget(Section):
    """What a cheaper plan may lose beside the plan without techniques, from the same noise. One of these."""

    accuracy: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of what prompts say, by the pack's oracle: prompts of the shapes world alone.",
    )
    judge: float | None = Field(
        None, ge=0, lt=1, description="Of the judge's mean score, P(yes) weighed as the rubric does."
    )
    psnr: float | None = Field(None, gt=0, description="Least mean PSNR of clips, dB.")

    @model_validator(mode="after")
    def _is_one(self) -> QualityBudget:
        if sum(getattr(self, name) is not None for name in MEASURES) != 1:
            raise ValueError(f"give exactly one of {', '.join(MEASURES)}")
        return self

    @property
    def measure(self) -> Measure:
        return next(name for name in MEASURES if getattr(self, name) is not None)

    @property
    def most(self) -> float:
        """Greatest loss, as `lost` has it."""
        amount = float(getattr(self, self.measure))
        return -amount if self.measure == "psnr" else amount

    def __str__(self) -> str:
        return f"{self.measure}={getattr(self, self.measure):g}"

    def allows(self, loss: float) -> bool:
        """Whether a loss is within the budget, which one of exactly so much is."""
        return loss <= self.most + ROUNDING

    @property
    def nearly(self) -> float:
        """Greatest loss that still leads somewhere: twice the budget, or 3 dB less."""
        return self.most + 3 if self.measure == "psnr" else 2 * self.most

    @property
    def name(self) -> str:
        """The same as a part of a file's name."""
        return str(self).replace("=", "-")

    def number(self, loss: float) -> str:
        """A loss as a person reads it: dB, or points of a hundred."""
        return f"{-loss:.1f}" if self.measure == "psnr" else f"{100 * loss:.2f}"

    def in_words(self, loss: float) -> str:
        if self.measure == "psnr":
            return f"PSNR {self.number(loss)} dB"
        what = "accuracy" if self.measure == "accuracy" else "the judge's score"
        return f"{self.number(loss)} points of {what} lost"


def parse_budget(text: str) -> QualityBudget:
    """`accuracy=0.01`, `judge=0.01` or `psnr=30`. UserError for anything else."""
    name, _, amount = text.partition("=")
    try:
        return QualityBudget.model_validate({name.strip(): amount.strip()})
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{KEY}: expected accuracy=0.01, judge=0.01 or psnr=30, found {text!r} ({said})") from error


def lost(budget: QualityBudget, ours: np.ndarray, theirs: np.ndarray) -> float:
    """What a plan lost: of accuracy and judge the difference of means, of psnr the mean with its sign changed.

    Args:
        ours: float64 [n, 2], of each sample its score and the score's weight.
        theirs: the same of the other plan, of the same samples in the same order; of psnr they are not looked at.
    """
    return -_mean(ours) if budget.measure == "psnr" else _mean(theirs) - _mean(ours)


def interval(budget: QualityBudget, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95% interval of `lost`, by bootstrap over samples: of the paired difference."""
    return bootstrap(lambda *columns: lost(budget, *columns), ours, theirs)


def surely_misses(budget: QualityBudget, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether even the favourable end of the interval is outside of the budget; of fewer than LEAST samples none is sure."""
    if len(ours) < LEAST or budget.allows(lost(budget, ours, theirs)):
        return False
    return not budget.allows(interval(budget, ours, theirs)[0])


def _mean(values: np.ndarray) -> float:
    return float(values[:, 0].sum() / values[:, 1].sum())


def weighed(scores: Any) -> np.ndarray:
    """Scores of equal weight as `lost` takes them: float64 [n, 2]."""
    column = np.asarray(scores, dtype=np.float64)
    return np.stack([column, np.ones_like(column)], axis=1)
