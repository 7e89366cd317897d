from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.multimodal import MultimodalRef, load_multimodal
from stages.actor import run_stage
from stages.batch import Batch, jsons, load_json, texts
from stages.judge import JudgeQuality
from stages.rubric import load_rubric, with_decomposed
from stages.screen import ScreenQuality

COUNT = 12


def batch(num_frames: int = 9) -> Batch:
    coarse = np.random.default_rng(0).integers(0, 256, (COUNT, num_frames, 4, 4, 3), dtype=np.uint8)
    return {
        "sample_id": texts([f"{at:032x}" for at in range(COUNT)]),
        "prompt": texts([f"a red circle, number {at}" for at in range(COUNT)]),
        "frames": coarse.repeat(16, axis=2).repeat(16, axis=3),
        "verdict": texts(["accepted"] * COUNT),
        **{name: texts([""] * COUNT) for name in ("scores", "reasons", "error", "error_type", "error_stage")},
    }


def scores(out: Batch) -> list[dict[str, float]]:
    return [{item["name"]: item["value"] for item in row} for row in load_json(out["scores"])]


@pytest.fixture
def screen(tiny_pack):
    return ScreenQuality(load_rubric("default"), MultimodalRef(str(tiny_pack / "judge")), num_frames=2)


@pytest.fixture
def judge(screen):
    return JudgeQuality(screen.rubric, screen.model, num_frames=8)


def test_cascade_is_the_judge_where_the_screen_is_not_sure(screen, judge):
    """A band in which all samples fall changes no verdict, no reason and no answer of the judge."""
    alone, _ = run_stage(judge, batch())
    wide = replace(screen, reject=0.0)
    first, _ = run_stage(wide, batch())
    both, _ = run_stage(replace(judge, screen=wide), first)
    assert list(both["verdict"]) == list(alone["verdict"])
    assert list(both["reasons"]) == list(alone["reasons"])
    for one, other in zip(scores(both), scores(alone), strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other, abs=1e-5)
        assert set(one) - set(other) == {"screen_prompt_match", "screen_no_artefacts", "screen_motion_smooth"}


def test_a_screen_settles_by_what_each_record_is_asked(screen, judge):
    """Half of the records have tags, and half of the prompts two facts: no sample waits for an answer that nobody gave."""
    rubric = with_decomposed(load_rubric(["default", "prompt_match"]), 0.5)
    facts = [{"question": "Is it red?", "needs": []}, {"question": "Is it round?", "needs": [0]}]
    data = batch() | {
        "tags": jsons([["a"] if at % 2 else [] for at in range(COUNT)]),
        "decomposed": jsons([facts if at % 2 else [] for at in range(COUNT)]),
    }
    sure = replace(screen, rubric=rubric, reject=0.0, accept=0.0, facts="least")
    first, _ = run_stage(sure, data)
    assert not JudgeQuality(rubric, judge.model, screen=sure).wants(first).any()
    answered = scores(first)
    assert ["screen_tags_match" in row for row in answered] == [bool(at % 2) for at in range(COUNT)]
    assert all("screen_decomposed" in row for row in answered)
    unsure = replace(sure, accept=None)
    both, _ = run_stage(JudgeQuality(rubric, judge.model, screen=unsure, facts="least"), first)
    assert [len(row) for row in load_json(both["decomposed"])] == [2 if at % 2 else 1 for at in range(COUNT)]
    for row, kept in zip(scores(both), load_json(both["decomposed"]), strict=True):
        assert row["decomposed"] == pytest.approx(min(fact["p_yes"] for fact in kept))


@pytest.mark.parametrize(("num_frames", "asked_again"), [(8, 1), (9, 1), (2, 3)])
def test_one_model_is_not_asked_twice_about_the_same_frames(screen, judge, monkeypatch, num_frames, asked_again):
    """A screen with two of three questions, of a clip with 8 frames; 9 are no more."""
    rubric = with_decomposed(judge.rubric, 0.5)
    facts = jsons([[{"question": "Is it red?", "needs": []}]] * COUNT)
    data = batch(8) | {"decomposed": facts}
    some = replace(screen, rubric=rubric.only(["prompt_match", "no_artefacts"]), num_frames=num_frames, reject=0.0)
    both = replace(judge, rubric=rubric, screen=some)
    alone, _ = run_stage(replace(both, screen=None), data)
    first, _ = run_stage(some, data)
    asked = []
    model = load_multimodal(judge.model)
    p_yes = model.p_yes
    monkeypatch.setattr(model, "p_yes", lambda frames, texts: asked.extend(texts) or p_yes(frames, texts))
    out, _ = run_stage(both, first)
    assert {len(texts) for texts in asked} == {asked_again + 1}, "the fact is asked in any case"
    for one, other in zip(scores(out), scores(alone), strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other, abs=1e-5)


def test_cascade_asks_the_judge_of_the_undecided_alone(screen, judge):
    """With a band in the middle of the answers: below it rejected, above it accepted, in it what the judge says."""
    first, _ = run_stage(replace(screen, reject=0.0), batch())
    answers = [list(row.values()) for row in scores(first)]
    low = float(np.quantile([min(row) for row in answers], 0.4))
    high = float(np.quantile([min(row) for row in answers], 0.7))
    sure = replace(screen, reject=low, accept=high)
    out, _ = run_stage(sure, batch())
    out, _ = run_stage(replace(judge, screen=sure), out)
    alone, _ = run_stage(judge, batch())
    tiers = {"rejected": 0, "accepted": 0, "judged": 0}
    for at, (row, costs) in enumerate(zip(scores(out), load_json(out["cost"]), strict=True)):
        worst = min(answers[at])
        if worst < low or worst >= high:
            tier = "rejected" if worst < low else "accepted"
            assert out["verdict"][at] == tier and set(row) == {name for name in row if name.startswith("screen_")}
            assert [cost["stage"] for cost in costs] == ["screen"], "the judge is not paid for what it was not asked"
        else:
            tier = "judged"
            assert out["verdict"][at] == alone["verdict"][at]
            assert [cost["stage"] for cost in costs] == ["screen", "judge"]
        tiers[tier] += 1
    assert min(tiers.values()) >= 2, tiers
    (reason, *_) = load_json(out["reasons"])[int(np.argmin([min(row) for row in answers]))]
    assert reason.startswith("screen_") and reason.endswith(f"< {low:g}")


def test_known_answers_settle_without_a_model(screen, judge):
    both = replace(judge, screen=replace(screen, reject=0.2, accept=0.9))
    sure = {"screen_prompt_match": 0.95, "screen_no_artefacts": 0.9, "screen_motion_smooth": 0.99}
    judged = {"prompt_match": 0.6, "no_artefacts": 0.4, "motion_smooth": 0.8}
    assert both.settle(sure, 9) == ("accepted", [])
    assert both.settle(sure | {"screen_no_artefacts": 0.1}, 9) == ("rejected", ["screen_no_artefacts 0.10 < 0.2"])
    undecided = sure | {"screen_no_artefacts": 0.5}
    assert both.settle(undecided, 9) is None
    assert both.settle(undecided | judged, 9) == ("rejected", ["no_artefacts 0.40 < 0.5"])
    assert both.settle({name: sure[name] for name in list(sure)[:2]}, 9) is None
    assert both.settle({name: sure[name] for name in list(sure)[:2]}, 1) == ("accepted", []), "an image does not move"
    assert both.settle({}, 9) is None


def test_screen_that_answers_no_number_leaves_it_to_the_judge(screen, monkeypatch):
    """NaN is no answer: the sample is neither rejected nor accepted by it."""
    import stages.screen

    answers = [dict.fromkeys(("prompt_match", "no_artefacts", "motion_smooth"), np.nan)] * COUNT
    monkeypatch.setattr(stages.screen, "ask", lambda *_: (answers, [[]] * COUNT))
    out = replace(screen, accept=0.5)(batch())
    assert scores(out) == [{}] * COUNT
    assert set(out["verdict"]) == {"accepted"}
    tags = replace(screen, rubric=load_rubric("prompt_match").only(["tags_match"]), accept=0.5)
    assert tags.settle({}, 9) is None and tags.settle({"screen_tags_match": 0.9}, 9, {"tags": "a"}) is not None
    assert screen.settle({}, 9) is None and replace(screen, accept=0.5).settle({}, 9) is None


def test_batch_of_which_nothing_could_be_read_asks_nobody(screen, judge):
    """Without a live sample there are no frames and no answers of the screen to look at."""
    lost = {name: column for name, column in batch().items() if name not in ("frames", "scores")}
    lost["error_type"] = texts(["read_failed"] * COUNT)
    first, _ = run_stage(screen, lost)
    out, seconds = run_stage(replace(judge, screen=screen), first)
    assert out is lost and seconds == 0.0
