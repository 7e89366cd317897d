"""How far a judge's probabilities can be believed, and what filtering and ranking by them does to a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

from models.pack.grammar import ATTRIBUTES, Scene, Shot
from models.pack.train.loop import stream
from pipelines.operating_point import EDGE

BINS = 10
Mapping = Callable[[np.ndarray], np.ndarray]
"""From P(yes) to a better one."""


def bins(p_yes: np.ndarray) -> list[np.ndarray]:
    """Rows in order of P(yes), in ten bins of equally many."""
    return [part for part in np.array_split(np.argsort(p_yes, kind="stable"), BINS) if len(part)]


def calibration_error(p_yes: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: |mean P(yes) - share of yes| of each of `bins`, weighed by what is in it."""
    return float(sum(abs(p_yes[part].sum() - right[part].sum()) for part in bins(p_yes)) / len(right))


def error_interval(p_yes: np.ndarray, right: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the calibration error by bootstrap, moved down by what drawing again adds to it on average."""
    rng = stream(seed, 6_690_000)
    rows = rng.integers(len(right), size=(draws, len(right)))
    found = np.asarray([calibration_error(p_yes[some], right[some]) for some in rows])
    low, high = np.percentile(found, [2.5, 97.5]) - (found.mean() - calibration_error(p_yes, right))
    return max(0.0, float(low)), float(high)


def error_by_chance(p_yes: np.ndarray, draws: int = 300, seed: int = 0) -> float:
    """The mean calibration error on so few clips of a judge whose every P(yes) is true: it is not zero."""
    rng = stream(seed, 6_700_000)
    return float(np.mean([calibration_error(p_yes, rng.random(len(p_yes)) < p_yes) for _ in range(draws)]))


def platt(p_yes: np.ndarray, right: np.ndarray) -> Mapping:
    """A logistic curve over P(yes)'s logit (Platt 1999)."""
    from sklearn.linear_model import LogisticRegression

    curve = LogisticRegression(C=100.0).fit(_logits(p_yes), right)
    return lambda other: np.asarray(curve.predict_proba(_logits(other))[:, 1])


def isotonic(p_yes: np.ndarray, right: np.ndarray) -> Mapping:
    """The rising step function that is nearest to the labels (Zadrozny and Elkan 2002), straight lines between."""
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(p_yes, right.astype(float)).predict


def from_other_half(
    fit: Callable[[np.ndarray, np.ndarray], Mapping], p_yes: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Every P(yes) as mapped by what was fitted on the half that it is not in; halves take turns."""
    made = np.zeros(len(p_yes))
    for half in (0, 1):
        made[half::2] = fit(p_yes[1 - half :: 2], right[1 - half :: 2])(p_yes[half::2])
    return made


class Gain(NamedTuple):
    """Mean of the chosen less mean of all, by the score that chose and by the truth."""

    claimed: float
    true: float


def best_of(scores: np.ndarray, truth: np.ndarray, count: int) -> Gain:
    """What choosing the best of `count` samples by score gains; scores and truth are [prompts, samples].

    The mean over all sets of `count` of a prompt's samples: the sample of rank r (from 0) is the best of C(r, count - 1).
    """
    samples = scores.shape[1]
    weights = np.asarray([comb(rank, count - 1) for rank in range(samples)]) / comb(samples, count)
    order = np.argsort(scores, axis=1, kind="stable")
    means = (float((np.take_along_axis(each, order, 1) @ weights).mean() - each.mean()) for each in (scores, truth))
    return Gain(*means)


def values(scene: Scene) -> Iterator[tuple[str, ...]]:
    """Every attribute's value that a scene shows, every figure's with its shot's background beside, as (name=value,)."""
    for shot in scene.shots:
        for figure in shot.figures:
            said = {name: getattr(figure, name) for name in ATTRIBUTES} | {"background": shot.background}
            yield from ((f"{name}={value}",) for name, value in said.items() if value is not None)


def pairs(scene: Scene) -> Iterator[tuple[str, ...]]:
    """The same for every two attributes of a figure."""
    for shot in scene.shots:
        for figure in shot.figures:
            said = list(values(Scene((Shot((figure,), shot.background),))))
            yield from (a + b for a, b in combinations(said, 2))


class Lost(NamedTuple):
    """Shares of what all clips show that is in none of the chosen: by the filter, and by chance at the same number."""

    filtered: float
    by_chance: float
    low: float
    high: float
    count: int


def lost(shown: Sequence[set[tuple[str, ...]]], kept: np.ndarray, draws: int = 1000, seed: int = 0) -> Lost:
    """What is lost of everything `shown` where only `kept` clips stay; 95% of random choices lie from `low` to `high`."""
    every = sorted(set().union(*shown))
    table = np.asarray([[each in clip for each in every] for clip in shown])

    def share(rows: np.ndarray) -> float:
        return float(1 - table[rows].any(axis=0).mean())

    rng = stream(seed, 6_710_000)
    chance = [share(rng.permutation(len(shown))[: int(kept.sum())]) for _ in range(draws)]
    low, high = np.percentile(chance, [2.5, 97.5])
    return Lost(share(np.flatnonzero(kept)), float(np.mean(chance)), float(low), float(high), len(every))


def _logits(p_yes: np.ndarray) -> np.ndarray:
    clipped = np.clip(p_yes.astype(float), EDGE, 1 - EDGE)
    return np.log(clipped / (1 - clipped))[:, None]
