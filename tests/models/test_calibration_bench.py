"""`ditmill bench calibration`: its arithmetic on cases worked out by hand, and the judge on clips whose truth is known."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from models.pack.grammar import Figure, Scene, Shot
from models.pack.train.loop import stream
from tests.bench.support.calibrated import (
    best_of,
    calibration_error,
    error_by_chance,
    from_other_half,
    isotonic,
    lost,
    pairs,
    platt,
    values,
)
from tests.bench.support.judged_clips import Bench, prompts


def test_calibration_error_is_the_mean_distance_of_the_bins() -> None:
    p_yes = np.repeat(np.linspace(0.05, 0.95, 10), 4)
    right = np.tile([True, False, True, False], 10)  # half of each bin
    assert calibration_error(p_yes, right) == pytest.approx(0.25)
    assert calibration_error(right.astype(float), right) == 0.0


def test_a_calibrated_judge_errs_by_chance_as_the_binomial_says() -> None:
    # E|share - p| of 100 flips is sqrt(2 / pi) sqrt(p (1 - p) / 100)
    assert error_by_chance(np.full(1000, 0.5)) == pytest.approx(np.sqrt(2 / np.pi) * 0.05, rel=0.05)


@pytest.mark.parametrize("fit", [platt, isotonic])
def test_what_is_fitted_on_one_half_mends_the_other(fit) -> None:
    rng = stream(0, 1)
    logit = rng.normal(0, 2, 4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-logit))
    sure = 1 / (1 + np.exp(-(3 * logit + 1)))
    made = from_other_half(fit, sure, right)
    assert calibration_error(sure, right) > 0.1
    assert calibration_error(made, right) < 0.03
    other = right.copy()
    other[::2] = ~other[::2]  # the labels of a half say nothing about what becomes of it
    np.testing.assert_array_equal(from_other_half(fit, sure, other)[::2], made[::2])


def test_the_best_of_some_is_their_mean_over_all_sets() -> None:
    scores = np.asarray([[0.1, 0.9, 0.5, 0.3], [0.2, 0.4, 0.8, 0.6]])
    truth = np.asarray([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    assert best_of(scores, truth, 4) == pytest.approx((0.85 - 0.475, 0.5 - 0.375))
    assert best_of(scores, truth, 1) == pytest.approx((0.0, 0.0))
    for count in (2, 3):
        picks = [max(some, key=lambda at: row[at]) for row in scores for some in combinations(range(4), count)]
        rows = np.repeat([0, 1], len(picks) // 2)
        assert best_of(scores, truth, count) == pytest.approx(
            (scores[rows, picks].mean() - scores.mean(), truth[rows, picks].mean() - truth.mean())
        )


def test_what_filtering_loses_is_told_from_what_fewer_clips_lose() -> None:
    shown = [{("a",)}, {("a",)}, {("b",)}, {("c",)}]
    found = lost(shown, np.asarray([True, True, False, False]))
    assert found.filtered == pytest.approx(2 / 3) and found.count == 3
    assert found.by_chance == pytest.approx(
        7 / 18, abs=0.02
    )  # one of six pairs of clips loses two values, five lose one
    assert lost(shown, np.ones(4, bool))[:4] == (0.0, 0.0, 0.0, 0.0)


def test_a_figure_shows_its_values_and_every_two_of_them() -> None:
    scene = Scene((Shot((Figure("star", "red", None, "growing"), Figure("ring", "blue", "small", "left")), "grey"),))
    assert ("shape=star",) in set(values(scene)) and ("background=grey",) in set(values(scene))
    assert len(set(values(scene))) == 3 + 4 + 1
    assert len(list(pairs(scene))) == 6 + 10
    assert ("shape=star", "colour=blue") not in set(pairs(scene))


def test_more_prompts_begin_with_the_same_ones() -> None:
    few, more = prompts(5, 0, "held_out", each=2), prompts(8, 0, "held_out", each=2)
    assert more.prompts[:10] == few.prompts and few.indices == (0, 1) * 5
    assert few.prompts[0] == few.prompts[1] != few.prompts[2]
    assert not set(few.scenes) & set(prompts(200, 0, "train").scenes)


def test_rendered_clips_are_right_and_their_answers_are_kept(tmp_path: Path) -> None:
    asked = prompts(6, 0, "train")
    found = Bench(0, tmp_path, str).rendered(asked)
    assert found.marks.all() and not found.altered_match.any()
    assert found.p_yes.shape == (6, 3) and found.p_yes[:, 0].mean() > found.altered_p_yes.mean() + 0.2
    (kept,) = tmp_path.iterdir()
    np.save(kept, np.load(kept) / 2)
    np.testing.assert_array_equal(Bench(0, tmp_path, str).rendered(asked).p_yes, found.p_yes / 2)
