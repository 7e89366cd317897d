from __future__ import annotations

import json
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest

from infra.errors import UserError
from models.multimodal import MultimodalRef, load_multimodal
from models.pack.phrases import parse
from models.pack.world import render
from stages.batch import Batch, jsons, load_json, texts
from stages.judge import JudgeQuality
from stages.rubric import decide, load_rubric


def batch(count: int = 4, num_frames: int = 9) -> Batch:
    coarse = np.random.default_rng(0).integers(0, 256, (count, num_frames, 4, 4, 3), dtype=np.uint8)
    return {
        "prompt": texts([f"a red circle, number {at}" for at in range(count)]),
        "frames": coarse.repeat(16, axis=2).repeat(16, axis=3),
        "scores": jsons([[{"name": "sharpness", "value": float(at)}] for at in range(count)]),
        "verdict": texts([""] * count),
        "reasons": jsons([[]] * count),
        "error": texts([""] * count),
        "error_type": texts([""] * count),
    }


def scores(out: Batch) -> list[dict[str, float]]:
    return [{score["name"]: score["value"] for score in row} for row in load_json(out["scores"])]


@pytest.fixture
def judge(tiny_pack):
    return JudgeQuality(load_rubric("default"), MultimodalRef(str(tiny_pack / "judge")), num_frames=4)


@pytest.fixture
def call(monkeypatch):
    """Installs a function as `mine:score` and gives a judge that calls it."""

    def install(function, **thresholds: float) -> JudgeQuality:
        module = ModuleType("mine")
        module.score = function
        monkeypatch.setitem(sys.modules, "mine", module)
        bars = tuple(thresholds.items())
        return JudgeQuality(load_rubric("default"), backend="call", call="mine:score", version="1", thresholds=bars)

    return install


def test_judge_scores_each_question_with_p_yes(judge):
    data = batch()
    judge.load()
    out = judge(data)
    for at, row in enumerate(scores(out)):
        assert list(row) == ["sharpness", "prompt_match", "no_artefacts", "motion_smooth"]
        assert row["sharpness"] == at
    asked = [question.format(data["prompt"][2], 9) for question in judge.rubric.questions]
    expected = load_multimodal(judge.model).p_yes(data["frames"][2:3, [0, 3, 5, 8]], [asked])[0]
    np.testing.assert_allclose(list(scores(out)[2].values())[1:], expected, atol=1e-5)


def test_judge_verdict_is_what_the_scores_say(judge):
    out = judge(batch(12))
    bars = judge.rubric.thresholds()
    assert set(out["verdict"]) == {"accepted", "rejected"}
    for verdict, reasons, row in zip(out["verdict"], load_json(out["reasons"]), scores(out), strict=True):
        assert (verdict, reasons) == decide(row, bars)
        assert (verdict == "accepted") == all(row[name] >= bar for name, bar in bars.items())


def test_judge_takes_the_thresholds_of_the_spec(judge):
    bars = (("prompt_match", 0.0), ("no_artefacts", 1.0), ("motion_smooth", 0.0))
    out = JudgeQuality(judge.rubric, judge.model, thresholds=bars)(batch(2))
    assert list(out["verdict"]) == ["rejected", "rejected"]
    assert all(
        reason.startswith("no_artefacts 0.") and reason.endswith("< 1") for (reason,) in load_json(out["reasons"])
    )


def test_judge_does_not_ask_about_the_motion_of_an_image(judge):
    out = judge(batch(2, num_frames=1))
    assert all(list(row) == ["sharpness", "prompt_match", "no_artefacts"] for row in scores(out))
    assert set(out["verdict"]) <= {"accepted", "rejected"}


def test_judge_asks_only_what_the_record_has_parts_for(judge):
    rubric = load_rubric(["default", "prompt_match"])
    columns = {
        "negative_prompt": texts(["", "hats", "", "hats"]),
        "tags": jsons([[], [], ["a", "b"], ["a"]]),
        "extra": texts(["", "{}", "{}", "{}"]),
    }
    data = {**batch(), **columns}
    both = JudgeQuality(rubric, judge.model, num_frames=4)
    out = both(data)
    assert list(out["error_type"]) == [""] * 4
    found = scores(out)
    assert [("nothing_unwanted" in row, "tags_match" in row) for row in found] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    for at, (row, reasons) in enumerate(zip(found, load_json(out["reasons"]), strict=True)):
        alone = scores(both({name: column[at : at + 1] for name, column in data.items()}))[0]
        assert row == pytest.approx(alone, abs=1e-5)
        assert {reason.split()[0] for reason in reasons} <= set(row), "no threshold is missed by what was not asked"
    text = next(question for question in rubric.questions if question.name == "tags_match").text
    asked = text.replace("{media}", "video").replace("{tags}", "a, b")
    expected = load_multimodal(judge.model).p_yes(data["frames"][2:3, [0, 3, 5, 8]], [[asked]])[0, 0]
    assert found[2]["tags_match"] == pytest.approx(expected, abs=1e-5)


def test_judge_marks_an_answer_that_is_no_number_among_ragged_ones(judge, monkeypatch):
    model = load_multimodal(judge.model)
    head = model.model.lm_head
    monkeypatch.setattr(head, "forward", lambda hidden: head.__class__.forward(head, hidden) * float("nan"))
    columns = {"tags": jsons([[], ["a"]]), "negative_prompt": texts([""] * 2), "extra": texts([""] * 2)}
    out = JudgeQuality(load_rubric("prompt_match"), judge.model, num_frames=4)({**batch(2), **columns})
    assert list(out["error_type"]) == ["judge_failed"] * 2
    assert ["tags_match" in error for error in out["error"]] == [False, True]


def test_judge_accepts_what_it_has_nothing_to_ask_about(judge, tmp_path):
    (tmp_path / "tags.yaml").write_text("questions: [{name: tagged, text: 'Is it {tags}?'}]")
    out = JudgeQuality(load_rubric(str(tmp_path / "tags.yaml")), judge.model, num_frames=4)(batch(2))
    assert list(out["verdict"]) == ["accepted"] * 2 and list(out["error_type"]) == [""] * 2
    assert all(list(row) == ["sharpness"] for row in scores(out))


def test_judge_keeps_every_row_in_order(judge):
    out = judge(batch(3))
    assert list(out["prompt"]) == list(batch(3)["prompt"])
    assert {len(column) for column in out.values()} == {3}


def test_judge_marks_an_answer_that_is_no_number(call):
    answers = [0.9, float("nan"), None, "many", float("inf"), 0.1]
    out = call(lambda data: {"good": answers}, good=0.5)(batch(6))
    assert list(out["error_type"]) == ["", "judge_failed", "judge_failed", "judge_failed", "judge_failed", ""]
    assert list(out["verdict"]) == ["accepted", "", "", "", "", "rejected"]
    assert out["error"][1] == "the judge's answer to good is no finite number"
    assert load_json(out["reasons"])[5] == ["good 0.10 < 0.5"]
    assert all(np.isfinite(value) for row in scores(out) for value in row.values())


def test_judge_calls_the_users_code_with_the_batch(call):
    seen = {}

    def score(data):
        seen.update(data)
        return {"brightness": data["frames"].mean(axis=(1, 2, 3, 4)), "extra": [1] * 4}

    judge = call(score, brightness=0)
    judge.load()
    out = judge(batch())
    assert seen["frames"].shape == (4, 9, 64, 64, 3)
    assert scores(out)[0] == {"sharpness": 0, "brightness": pytest.approx(batch()["frames"][0].mean()), "extra": 1}
    assert set(out["verdict"]) == {"accepted"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5], r"mine:score: expected \{name: n floats\}, found list"),
        ({"good": [0.5]}, r"mine:score: good: expected 4 floats, found shape \(1,\)"),
        ({"good": 0.5}, r"mine:score: good: expected 4 floats, found float"),
        ({"fine": [0.5] * 4}, r"judge.thresholds.good: mine:score gives no such score; it gives fine"),
    ],
)
def test_judge_refuses_answers_of_another_shape(answer, message, call):
    with pytest.raises(UserError, match=message):
        call(lambda data: answer, good=0.5)(batch())


@pytest.mark.parametrize("path", ["no_such_module:score", "json:no_such_function", "json", "", "json:__name__", ":x"])
def test_judge_names_code_that_cannot_be_called(path):
    with pytest.raises(UserError, match=r"^judge.call: "):
        JudgeQuality(load_rubric("default"), backend="call", call=path).load()


@pytest.mark.parametrize(
    ("values", "bars", "verdict", "reasons"),
    [
        ({"a": 0.5}, {"a": 0.5}, "accepted", []),
        ({"a": 0.31}, {"a": 0.5}, "rejected", ["a 0.31 < 0.5"]),
        ({"a": 0.4999}, {"a": 0.5}, "rejected", ["a 0.4999 < 0.5"]),
        ({"a": float("nan")}, {"a": 0.5}, "rejected", ["a nan < 0.5"]),
        (
            {"a": 0.1, "b": 0.2, "c": 0.9},
            {"a": 0.5, "b": 0.25, "c": 0.8},
            "rejected",
            ["a 0.10 < 0.5", "b 0.20 < 0.25"],
        ),
        ({"a": 0.1}, {"b": 0.5}, "accepted", []),
        ({}, {}, "accepted", []),
    ],
)
def test_decide(values, bars, verdict, reasons):
    assert decide(values, bars) == (verdict, reasons)


def test_judge_pickles_without_its_model(judge):
    judge.load()
    assert pickle.loads(pickle.dumps(judge)) == judge
    assert len(pickle.dumps(judge)) < 10_000
    assert json.dumps(judge.rubric.model_dump())


def oracle() -> JudgeQuality:
    return JudgeQuality(load_rubric("default"), backend="oracle")


def rendered(shown: list[str], asked: list[str], num_frames: int = 17) -> Batch:
    scenes = [parse(prompt) for prompt in shown]
    return batch(len(shown)) | {
        "prompt": texts(asked),
        "frames": render(scenes, range(len(shown)), num_frames=num_frames),
    }


def test_the_oracle_accepts_clips_that_show_their_prompt_and_no_others():
    shown = ["a small red circle moving right on a white background", "a large blue star at rest on a black background"]
    data = rendered(shown * 2, [shown[0], "a blue star", shown[1], "a blue star spinning"])
    judge = oracle()
    judge.load()
    out = judge(data)
    assert [row["prompt_match"] for row in scores(out)] == [1, 1, 0, 0]
    assert all(row["no_artefacts"] == row["motion_smooth"] == 1 for row in scores(out))
    assert list(out["verdict"]) == ["accepted", "accepted", "rejected", "rejected"]
    assert load_json(out["reasons"])[2] == ["prompt_match 0.00 < 0.5"]


def test_the_oracle_rejects_noise_flicker_and_jumps():
    prompt = "a large red square moving right on a white background"
    data = rendered([prompt] * 4, [prompt] * 4)
    rng, frames = np.random.default_rng(0), data["frames"]
    frames[1] = rng.integers(0, 256, frames[1].shape)
    frames[2, ::2] = frames[2, ::2] * 0.93
    frames[3] = frames[3][rng.permutation(17)]
    out = oracle()(data)
    assert [(row["no_artefacts"], row["motion_smooth"]) for row in scores(out)] == [(1, 1), (0, 0), (1, 0), (1, 0)]


def test_the_oracle_looks_at_images_without_motion():
    prompt = "a picture of a small red circle on a white background"
    out = oracle()(rendered([prompt], [prompt], num_frames=1))
    assert scores(out)[0] == {"sharpness": 0, "prompt_match": 1, "no_artefacts": 1}


def test_the_oracle_fails_a_prompt_outside_the_grammar_alone():
    prompt = "a small red circle moving right on a white background"
    out = oracle()(rendered([prompt] * 2, ["a red cat sleeping", prompt]))
    assert list(out["error_type"]) == ["judge_failed", ""]
    assert out["error"][0] == "the oracle judges prompts of the shapes world only; words outside it: cat, sleeping"
    assert list(out["verdict"]) == ["", "accepted"]
