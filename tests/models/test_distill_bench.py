"""`ditmill bench distill`: its statistics on numbers whose truth is known, and the whole of it on random weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.loading import GeneratorRef
from models.plan import SamplerPlan
from tests.bench.support.distilled import Arm, Targets, compared, figures_of, mean_pairwise_distance, ratio_of_means


def arm(name: str, right: list[dict[str, bool]], cost: float = 1.0, **more: object) -> Arm:
    made = Arm(name, GeneratorRef(""), SamplerPlan(), **more)  # type: ignore[arg-type]
    made.right = right
    made.nfe = {4}
    made.seconds = {"sample": [99.0, cost, cost], "decode": [9.0, 0.5]}
    return made


def rows(count: int, wrong: int) -> list[dict[str, bool]]:
    """Samples of two attributes, of which the second is wrong in the first `wrong`."""
    return [{"shape": True, "colour": at >= wrong} for at in range(count)]


def test_mean_pairwise_distance_of_three_points() -> None:
    values = np.zeros((3, 2, 2))
    values[1], values[2] = 1.0, 3.0
    assert mean_pairwise_distance(values) == pytest.approx((1 + 3 + 2) / 3)
    assert mean_pairwise_distance(np.ones((4, 5))) == 0.0
    noise = np.random.Generator(np.random.Philox(key=1)).standard_normal((6, 20_000))
    assert mean_pairwise_distance(noise) == pytest.approx(2**0.5, rel=0.01)  # of two independent unit normals


def test_a_paired_difference_is_surer_than_its_two_shares() -> None:
    """The same samples are wrong in both, and four more in the student: noise that both share is not counted."""
    teacher, student = arm("teacher", rows(200, 60)), arm("student", rows(200, 64))
    attributes, whole = compared(student, teacher, "the teacher's")
    assert (attributes.value, whole.value) == (pytest.approx(-1.0), pytest.approx(-2.0))
    assert attributes.low is not None and attributes.high is not None and whole.low is not None
    assert -2.2 < attributes.low < -1 < attributes.high <= 0 and whole.low > -4.4
    same = next(compared(student, student, "its own"))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_figures_stand_beside_the_teachers_with_their_targets() -> None:
    teacher = arm("teacher", rows(100, 10), cost=8.0)
    student = arm("student", rows(100, 30), cost=0.5, targets=Targets(points=-3.0, times=8.0, diversity=80.0))
    teacher.distances = {"latents": [1.0, 3.0], "pixels": [0.1, 0.1]}
    student.distances = {"latents": [0.5, 1.5], "pixels": [0.1, 0.1]}
    found = {figure.name: figure for figure in figures_of(student, teacher)}
    assert found["attributes right"].value == pytest.approx(85.0)
    assert found["samples right as a whole"].value == pytest.approx(70.0)
    assert found["attributes right, less the teacher's"].met is False
    assert (found["times less than the teacher's"].value, found["times less than the teacher's"].met) == (16.0, True)
    assert found["decoding a sample, CPU-seconds"].value == 0.5
    assert (found["share of the teacher's, latents"].value, found["share of the teacher's, latents"].met) == (
        50.0,
        False,
    )
    assert found["share of the teacher's, pixels"].value == pytest.approx(100.0)
    assert not any("the teacher's" in figure.name for figure in figures_of(teacher, teacher))


def test_a_share_of_nothing_is_nothing_to_measure() -> None:
    assert np.isnan(ratio_of_means(np.ones(2), np.zeros(2)))


def test_bench_distill_measures_every_arm(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.bench.distill import main

    student = str(shutil.copytree(tiny_pack / "generator", tmp_path / "student"))
    options = ["--teacher", str(tiny_pack / "generator"), "--samples", "4", "--prompts", "1", "--noises", "2"]
    options += ["--steps", "4", "--few", "2", "--batch-size", "2", "--sheet", str(tmp_path / "sheet.png"), "--json"]

    def measured(*more: str) -> tuple[dict[tuple[str, str], Any], dict[str, float]]:
        monkeypatch.setattr(sys, "argv", ["distill", *options, *more])
        main()
        found = {(row["part"], row["name"]): row for row in json.loads(capsys.readouterr().out)}
        return found, {part: row["value"] for (part, name), row in found.items() if name == "evaluations a sample"}

    found, evaluations = measured("--student", student)
    assert evaluations == {
        "teacher, 4 steps, guided": 8,
        "untrained, 2 steps, guided": 4,
        "untrained, 2 steps": 2,
        "student, 2 steps": 2,
        "student, 2 steps, 1 teacher's": 3,
        "student, 1 step": 1,
    }
    same = [found[f"{who}, 2 steps", "diversity of latents, RMSE between noises"] for who in ("untrained", "student")]
    assert same[0]["value"] == same[1]["value"] > 0  # one checkpoint, and the same noise
    assert found["student, 2 steps", "share of the teacher's, latents"]["target"] == 80.0
    assert (tmp_path / "sheet.png").stat().st_size > 1000

    found, evaluations = measured("--ablation", student, student)
    few = {"trained on accepted, 2 steps": 2, "trained on all, 2 steps": 2}
    assert evaluations == {"teacher, 4 steps, guided": 8, **few}
    assert found["trained on accepted, 2 steps", "attributes right, less those of all samples"]["value"] == 0
