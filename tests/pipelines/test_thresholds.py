from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.schema import SAMPLES
from infra.tables import Table
from pipelines.annotate import label, rejudge
from pipelines.annotate_stored import Judging
from pipelines.decisions import NONE, read_decisions
from pipelines.operating_point import by_precision, by_share
from pipelines.report import funnel_steps
from pipelines.report_data import Snapshot, read_facts
from pipelines.resolve import Resolved
from pipelines.run_rows import commit_run_row
from pipelines.thresholds import find_thresholds, told
from stages.rubric import Question

OTHERS = {"no_artefacts": 0.0, "motion_smooth": 0.0}


# ---- where a threshold is put


@pytest.mark.parametrize("count", [600, 4000], ids=["Platt", "isotonic"])
def test_precision_of_calibrated_answers_is_that_of_theory(count: int) -> None:
    """Answers that are uniform and calibrated: above t a share of (1 + t) / 2 is good, so 0.9 asks for t = 0.8."""
    rng = np.random.default_rng(count)
    scores = rng.uniform(size=count)
    point = by_precision("q", "aim", scores, rng.uniform(size=count) < scores, 0.9)
    assert point is not None and point.precision is not None and point.low is not None and point.high is not None
    assert point.calibrator == ("Platt" if count < 1000 else "isotonic")
    assert point.threshold == pytest.approx(0.8, abs=0.06)
    assert point.keeps == pytest.approx(0.2, abs=0.05)
    assert point.low <= 0.9 <= point.high and point.low < point.precision < point.high
    assert point.recall == pytest.approx(0.9 * 0.2 / 0.5, abs=0.07)


def test_precision_does_not_trust_the_scale_of_the_answers() -> None:
    """The same order gives the same samples, however over-confident the judge."""
    rng = np.random.default_rng(0)
    honest = rng.uniform(size=3000)
    good = rng.uniform(size=3000) < honest
    boastful = honest**0.1
    kept = [scores >= by_precision("q", "", scores, good, 0.85).threshold for scores in (honest, boastful)]  # type: ignore[union-attr]
    assert np.array_equal(*kept)


def test_precision_that_no_threshold_has_is_none() -> None:
    rng = np.random.default_rng(0)
    assert by_precision("q", "", rng.uniform(size=500), rng.uniform(size=500) < 0.5, 0.98) is None


def test_precision_that_only_the_curve_promises_is_none() -> None:
    """Good samples in the middle and bad ones at both ends: a rising curve promises most where there is least."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=900)
    good = (scores > 0.4) & (scores < 0.97)
    assert by_precision("q", "", scores, good, 0.98) is None
    assert by_precision("q", "", scores, good, 0.9) is not None


def test_share_keeps_the_best_and_all_that_are_equal() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.7, 0.3])
    assert by_share("q", "", scores, 0.6).threshold == 0.5
    assert by_share("q", "", scores, 0.41).threshold == 0.5
    assert by_share("q", "", scores, 0.4).threshold == 0.7
    tied = by_share("q", "", np.array([0.2, 0.8, 0.8, 0.8]), 0.25)
    assert (tied.threshold, tied.keeps) == (0.8, 0.75)


# ---- thresholds of a dataset


def add_samples(run: Resolved, answers: list[dict[str, float]], start: int = 0) -> list[str]:
    """One commit of samples that the run's judge answered so. Their ids."""
    (row, *_) = Table(run.storage, "samples").read().to_pylist()
    rows = []
    for at, answer in enumerate(answers, start):
        scores = [{"name": name, "value": value} for name, value in answer.items()]
        rows.append(
            row | {"sample_id": f"{at:032x}", "scores": scores, "judge": run.judge_name, "rubric": run.rubric_id}
        )
    part = write_part(run.storage, f"samples/added-{start}.parquet", pa.Table.from_pylist(rows, SAMPLES))
    Committer(Table(run.storage, "samples"), run.run_id).commit([part])
    return [each["sample_id"] for each in rows]


def answer(prompt_match: float) -> dict[str, float]:
    return {"prompt_match": prompt_match, "no_artefacts": 0.5, "motion_smooth": 0.5}


@pytest.fixture
def labelled(generated: Callable[..., Resolved], tmp_path: Path) -> tuple[Callable[..., Resolved], str]:
    """A dataset with 400 calibrated answers more, and a CSV that says of each sample whether it is good."""
    rng = np.random.default_rng(1)
    scores = rng.uniform(size=400)
    ids = add_samples(generated(), [answer(float(score)) for score in scores])
    lines = [
        f"{sample_id},{'Yes' if good else 'n'}"
        for sample_id, good in zip(ids, rng.uniform(size=400) < scores, strict=True)
    ]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["sample_id,label", *lines, f"{'0' * 31}x,maybe"]) + "\n")
    return generated, str(path)


def test_precision_is_reached_on_labels_and_decides(labelled: Any) -> None:
    generated, path = labelled
    run = find_thresholds(
        generated(judge={"thresholds": {"prompt_match": {"precision": 0.9, "labels": path}, **OTHERS}})
    )
    (point,) = run.points
    assert run.bars["prompt_match"] == point.threshold == pytest.approx(0.8, abs=0.08)
    assert run.spec.judge.thresholds["prompt_match"].precision == 0.9, "the spec stays as it was asked"
    assert point.samples == 400
    assert f"precision 0.9 is {point.threshold:.4g}: precision 0." in str(point) and "400 labels" in str(point)
    assert run.rubric_id != generated().rubric_id
    done = rejudge(run, lambda: pytest.fail("a model would have run"), scope="all")
    assert done.accepted + done.rejected + done.unchanged == 406
    verdicts = {sample_id: one.verdict for sample_id, one in read_decisions(run.storage).items()}
    for row in Table(run.storage, "samples").read().to_pylist():
        scores = {item["name"]: item["value"] for item in row["scores"]}
        good = scores["prompt_match"] >= point.threshold
        assert verdicts.get(row["sample_id"], row["verdict"]) == ("accepted" if good else "rejected")


def test_stored_labels_serve_as_well_as_a_file(labelled: Any) -> None:
    generated, path = labelled
    text = "\n".join(line for line in Path(path).read_text().splitlines() if not line.endswith("maybe"))
    Path(path).write_text(text + "\n")
    label(generated().storage, path)
    of_file = find_thresholds(generated(judge={"thresholds": {"prompt_match": {"precision": 0.9, "labels": path}}}))
    stored = find_thresholds(generated(judge={"thresholds": {"prompt_match": {"precision": 0.9}}}))
    assert of_file.points == stored.points


@pytest.mark.parametrize(
    ("bar", "message"),
    [
        ({"precision": 0.9}, "0 labels say yes or no.*at least 10 of each: begin with a number"),
        ({"precision": 0.9, "labels": "nowhere.csv"}, r"thresholds.prompt_match.labels: .*nowhere.csv: cannot be read"),
    ],
)
def test_too_few_labels_are_a_mistake(generated: Callable[..., Resolved], bar: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_thresholds(generated(judge={"thresholds": {"prompt_match": bar}}))


def test_precision_out_of_reach_is_a_mistake(labelled: Any) -> None:
    generated, path = labelled
    aim = {"no_artefacts": {"precision": 0.99, "labels": path}}
    with pytest.raises(UserError, match=r"no_artefacts.precision: no threshold reaches 0.99 on 400 labels"):
        find_thresholds(generated(judge={"thresholds": aim}))


def test_share_of_the_first_samples_is_found_once_and_stays(generated: Callable[..., Resolved]) -> None:
    spec = {"thresholds": {"prompt_match": {"keep": 0.25, "first": 20}, **OTHERS}}
    run = generated(judge=spec)
    assert find_thresholds(run).points == (), "six samples are not twenty"
    assert run.scoring()[-1].bars()["prompt_match"] == -math.inf, "until then everything passes"  # type: ignore[attr-defined]
    assert "found once 20 samples are answered, by the next run; until then everything passes it" in told(run)[0]
    add_samples(run, [answer(at / 100) for at in range(14)])
    own = [
        item["value"]
        for row in Table(run.storage, "samples").read().to_pylist()
        for item in row["scores"]
        if item["name"] == "prompt_match"
    ]
    found = find_thresholds(generated(judge=spec))
    assert found.points[0].threshold == sorted(own)[-5]
    commit_run_row(found, "started", status="running", extra_json=json.dumps({"kept": 1}))
    add_samples(run, [answer(0.99)] * 30, start=1000)
    later = find_thresholds(generated(judge=spec))
    assert later.points == found.points
    said = Table(run.storage, "runs").read(filter=pc.field("run_id") == found.run_id)["extra_json"].to_pylist()
    (extra,) = map(json.loads, said)
    assert extra["kept"] == 1 and extra["points"][0]["judge"] == run.judge_name
    other = generated(judge={**spec, "num_frames": 2})
    assert find_thresholds(other).points == (), "another judge's answers are none of this one's"


def test_share_without_first_is_left_to_releases(generated: Callable[..., Resolved]) -> None:
    run = generated(judge={"thresholds": {"overall": {"keep": 0.5}}})
    assert find_thresholds(run).points == ()
    (line,) = told(run)
    assert (
        line == "judge.thresholds.overall: the best 0.5 will be found by each release; until then everything passes it"
    )


def weight_of_one(run: Resolved) -> list[Question]:
    return [question.model_copy(update={"weight": 1.0}) for question in run.rubric.questions]


def test_share_of_overall_is_found_anew_under_other_weights(generated: Callable[..., Resolved]) -> None:
    run = generated(judge={"thresholds": {"overall": {"keep": 0.25, "first": 20}}})
    add_samples(run, [answer(at / 100) for at in range(14)])
    found = find_thresholds(run)
    commit_run_row(found, "started", status="running")
    assert find_thresholds(run).points == found.points
    other = replace(run, rubric=run.rubric.model_copy(update={"questions": tuple(weight_of_one(run))}))
    assert find_thresholds(other).points[0].threshold != found.points[0].threshold


def test_code_of_ones_own_may_give_any_numbers(generated: Callable[..., Resolved]) -> None:
    """Rewards are no probabilities: below none of them is minus infinity, and a curve is fitted on their own scale."""
    own = {"backend": "call", "call": "reward:score", "version": "1"}
    run = generated(judge={**own, "thresholds": {"reward": {"keep": 0.6}}})
    assert run.scoring()[-1].decide({"reward": -1.2}) == ("accepted", [])  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"thresholds.overall needs a rubric, which backend `call` has none of"):
        generated(judge={**own, "thresholds": {"overall": 0.5}})
    rng = np.random.default_rng(0)
    rewards = rng.normal(3, 2, size=800)
    good = rng.uniform(size=800) < 1 / (1 + np.exp(3 - rewards))
    point = by_precision("reward", "", rewards, good, 0.9)
    assert point is not None and point.low is not None and point.low <= 0.9 and 3.5 < point.threshold < 6


def test_overall_is_the_weighted_mean(generated: Callable[..., Resolved]) -> None:
    run = generated(judge={"thresholds": {"prompt_match": 0.0, **OTHERS, "overall": 0.6}})
    judge = run.scoring()[-1]
    found = {"prompt_match": 0.9, "no_artefacts": 0.2, "motion_smooth": 0.3}
    weighed = generated(judge={"thresholds": {"prompt_match": 0.0, **OTHERS}}).rubric_id
    assert run.rubric_id != weighed
    heavier = replace(run, rubric=run.rubric.model_copy(update={"questions": tuple(weight_of_one(run))}))
    assert heavier.asked == run.asked and heavier.rubric_id != run.rubric_id, "the verdict depends on the weights"
    assert run.rubric.overall(found) == pytest.approx((2 * 0.9 + 0.2 + 0.3) / 4)
    assert judge.decide(found) == ("rejected", ["overall 0.57 < 0.6"])  # type: ignore[attr-defined]
    assert judge.decide({**found, "motion_smooth": 0.5})[0] == "accepted"  # type: ignore[attr-defined]


# ---- a judge behind a screen

SCREEN = {"model": "pack://tiny", "num_frames": 2, "reject": 0.2, "accept": 0.9}


def test_what_a_row_says_of_its_judges(generated: Callable[..., Resolved]) -> None:
    plain, screened = generated(), generated(judge={"screen": SCREEN})
    assert [stage.name for stage in screened.scoring()] == ["score", "screen", "judge"]
    assert screened.judge_name == f"{plain.judge_name}, then {plain.judge_name}"
    assert screened.asked != plain.asked
    stricter = generated(judge={"screen": SCREEN | {"reject": 0.3}})
    assert (stricter.asked, stricter.judge_name) == (screened.asked, screened.judge_name), "the same was asked"
    assert stricter.rubric_id != screened.rubric_id, "and it is decided otherwise"
    assert generated(judge={"screen": SCREEN | {"num_frames": 3}}).asked != screened.asked
    fewer = generated(judge={"screen": SCREEN | {"questions": ["prompt_match"]}})
    assert fewer.asked != screened.asked
    assert [question.name for question in fewer.scoring()[1].rubric.questions] == ["prompt_match"]  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match=r"judge.screen.questions: rubric default has no question beauty; it has prompt"
    ):
        generated(judge={"screen": SCREEN | {"questions": ["beauty"]}})


def test_known_answers_of_both_tiers_decide_again(generated: Callable[..., Resolved]) -> None:
    """Rows that a screened run left, and a stricter screen: none of them is asked again but the one that lacks an answer."""
    run = generated(judge={"screen": SCREEN})
    first = {f"screen_{name}": value for name, value in answer(0.95).items()}
    sure = first | {"screen_no_artefacts": 0.95, "screen_motion_smooth": 0.95}
    rows = [
        (sure, "accepted"),
        (first | {"screen_no_artefacts": 0.05}, "rejected"),
        (first | answer(0.1), "rejected"),
        (first | answer(0.8), "accepted"),
        (first | {"screen_no_artefacts": 0.25} | answer(0.8), "rejected"),  # by the stricter screen
        (first, None),
    ]
    ids = add_samples(run, [scores for scores, _ in rows])
    work = Judging(generated(judge={"screen": SCREEN | {"reject": 0.3}}))
    stored = {row["sample_id"]: row for row in Table(run.storage, "samples").read().to_pylist()}
    for sample_id, (_, expected) in zip(ids, rows, strict=True):
        row = stored[sample_id] | {"verdict": "", "reasons": []}
        said = work.without_model(row, NONE)
        assert (said and said[0]["value"]) == expected
    assert [stage.name for stage in work.stages()] == ["screen", "judge"]


def test_funnel_tells_what_each_tier_saw(generated: Callable[..., Resolved]) -> None:
    run = generated(judge={"screen": SCREEN})
    before = Table(run.storage, "samples").dataset().count_rows()
    first = {f"screen_{name}": value for name, value in answer(0.95).items()}
    add_samples(run, [first] * 3 + [first | answer(0.8)] * 2 + [{}])
    facts = read_facts(Snapshot(run.storage), {})
    assert (facts.screened, facts.judged) == (5, before + 2)
    names = [step.name for step in funnel_steps(facts)]
    assert names[:6] == ["planned", "generated", "passed ScoreMedia", "screened", "judged", "accepted"]
