"""Where to put a threshold: by a precision on labelled answers, by the share of samples to keep, or of good ones to lose.

For a precision the answers are calibrated on the labels, so that each threshold has an expected share of good samples among
those that clear it: by isotonic regression (Zadrozny and Elkan 2002) where there are `ISOTONIC` labels or more, which is what
it needs, else by a logistic curve (Platt 1999). The threshold is the lowest that reaches the precision. What is told of it is
cross-fitted: of each fifth of the labels by the threshold that the other four give. Where that speaks against it, there is no
such threshold: a curve promises at its ends what no sample there keeps.

For a loss, the (k + 1)-th lowest score of n good samples is the threshold, with the largest k for which k losses in n speak
for a share of at most `loss`:

    B(95%; k + 1, n - k) <= loss        B: quantile of the beta distribution

That is the one-sided bound of Clopper and Pearson (1934), and as k depends on n alone also a tolerance limit (Wilks 1941):
whatever the scores' distribution, in 95% of all draws no more than `loss` of the good samples to come score lower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ISOTONIC = 1000
FOLDS = 5
LEAST = 10
"""Good samples that there must be at least, and bad ones."""

CONFIDENCE = 0.95
"""Of one-sided bounds."""

EDGE = 1e-6
"""Probabilities are kept this far from 0 and 1 where their logarithm is taken."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold that was found, and what it does to the samples that it was found on.

    `keeps` is the share that clears it. For a precision: `precision` with its 95% Wilson interval, and the recall of good
    samples, cross-fitted.
    """

    question: str
    aim: str
    threshold: float
    samples: int
    keeps: float
    calibrator: str = ""
    precision: float | None = None
    low: float | None = None
    high: float | None = None
    recall: float | None = None

    def __str__(self) -> str:
        said = f"judge.thresholds.{self.question}: {self.aim} is {self.threshold:.4g}"
        if self.precision is None:
            return f"{said}, found on {self.samples} samples"
        return (
            f"{said}: precision {self.precision:.3f} [{self.low:.3f}, {self.high:.3f}], recall {self.recall:.3f}"
            f" ({self.calibrator} on {self.samples} labels, cross-fitted), {self.keeps:.0%} of them kept"
        )


def by_precision(
    question: str, aim: str, scores: np.ndarray, good: np.ndarray, precision: float
) -> OperatingPoint | None:
    """The lowest threshold with this precision; None where none has it, or none that the labels bear out.

    `scores` are probabilities or rewards, float64 [n], and `good` bool [n] with at least `LEAST` of each kind.
    """
    from scipy.stats import binomtest
    from sklearn.model_selection import StratifiedKFold

    threshold = _lowest(scores, good, precision)
    if threshold is None:
        return None
    cleared = np.zeros(len(scores), dtype=bool)
    for rest, fold in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(scores[:, None], good):
        of_rest = _lowest(scores[rest], good[rest], precision)
        cleared[fold] = scores[fold] >= (math.inf if of_rest is None else of_rest)
    count, right = int(cleared.sum()), int((cleared & good).sum())
    low, high = binomtest(right, count).proportion_ci(method="wilson") if count else (0.0, 0.0)
    if high < precision:
        return None
    return OperatingPoint(
        question=question,
        aim=aim,
        threshold=threshold,
        samples=len(scores),
        keeps=float((scores >= threshold).mean()),
        calibrator=_calibrator(len(scores)),
        precision=right / count,
        low=float(low),
        high=float(high),
        recall=right / int(good.sum()),
    )


def by_share(question: str, aim: str, scores: np.ndarray, keep: float) -> OperatingPoint:
    """The threshold that the best `keep` of `scores` clear, float64 [n]; more of them where the last are equal."""
    threshold = float(np.sort(scores)[::-1][max(0, math.ceil(keep * len(scores)) - 1)])
    return OperatingPoint(question, aim, threshold, len(scores), keeps=float((scores >= threshold).mean()))


def at_most(events: int, trials: int) -> float:
    """The one-sided bound of a share of which so many events were seen."""
    from scipy.stats import beta

    return 1.0 if events >= trials else float(beta.ppf(CONFIDENCE, events + 1, trials - events))


def least_for(loss: float) -> int:
    """Good samples that there must be for any threshold to hold `loss`."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-loss))


def by_loss(scores: np.ndarray, loss: float) -> tuple[float, int] | None:
    """The threshold that loses at most `loss` of good samples, and how many of these it loses; None where they are too few.

    `scores` float64 [n] of good samples. What scores the threshold itself is not lost.
    """
    lost = -1
    while lost + 1 < len(scores) and at_most(lost + 1, len(scores)) <= loss:
        lost += 1
    if lost < 0:
        return None
    threshold = float(np.sort(scores)[lost])
    return threshold, int((scores < threshold).sum())


def _lowest(scores: np.ndarray, good: np.ndarray, precision: float) -> float | None:
    """The lowest of the scores above which the calibrated share of good ones is at least `precision`."""
    order = np.argsort(-scores, kind="stable")
    share = np.cumsum(calibrated(scores, good)[order]) / np.arange(1, len(scores) + 1)
    last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores all clear a threshold or none
    reached = np.flatnonzero(last & (share >= precision))
    return float(scores[order][reached[-1]]) if len(reached) else None


def calibrated(scores: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The probability that a sample with such a score is good, float64 [n], fitted on all of them."""
    if _calibrator(len(scores)) == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted: np.ndarray = IsotonicRegression(y_min=0, y_max=1).fit_transform(scores, good.astype(float))
        return fitted
    from sklearn.linear_model import LogisticRegression

    if scores.min() >= 0 and scores.max() <= 1:
        clipped = np.clip(scores, EDGE, 1 - EDGE)
        scale = np.log(clipped / (1 - clipped))
    else:  # a reward of the user's own
        scale = (scores - scores.mean()) / (scores.std() or 1.0)
    curve = LogisticRegression(C=100.0).fit(scale[:, None], good)
    return np.asarray(curve.predict_proba(scale[:, None])[:, 1])


def _calibrator(labels: int) -> str:
    return "isotonic" if labels >= ISOTONIC else "Platt"
