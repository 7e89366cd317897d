"""Prompts in facts: read off a language model's answer, kept, asked, and scored."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from infra.errors import UserError
from infra.storage import Storage
from models.facts import ENDING, INSTRUCTION, WHOLE, Fact, parse_facts, score_of
from models.language import LanguageRef, load_language
from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
from models.pack.decompose import decompose
from models.pack.grammar import sample_scenes
from models.pack.phrases import describe, parse
from models.pack.train.loop import stream
from models.pack.world import render
from stages.actor import run_stage
from stages.batch import Batch, load_json, texts
from stages.decompose import FOLDER, DecomposePrompts
from stages.judge import JudgeQuality
from stages.rubric import DECOMPOSED, load_rubric, with_decomposed

DOG = """\
1 | entity | - | Is there a dog?
2 | entity | - | Are there cats?
3 | attribute | 1 | Is the dog brown?
4 | relation | 1, 2 | Does the dog chase the cats?"""


def asked(facts: tuple[Fact, ...]) -> list[tuple[str, tuple[int, ...]]]:
    return [(fact.question.removesuffix(ENDING), fact.needs) for fact in facts]


# ---- what a language model wrote


def test_an_answer_is_read_with_what_each_question_needs() -> None:
    assert asked(parse_facts(DOG)) == [
        ("Is there a dog?", ()),
        ("Are there cats?", ()),
        ("Is the dog brown?", (0,)),
        ("Does the dog chase the cats?", (0, 1)),
    ]
    assert all(fact.question.endswith("? Answer Yes or No.") for fact in parse_facts(DOG))


@pytest.mark.parametrize(
    "written",
    [
        f"Sure, here are the facts:\n\n```text\n{DOG}\n```\nI hope this helps!",
        "\n".join(f"| {line} |" for line in DOG.splitlines()),
        DOG.replace("1 |", "1. |", 1).replace("entity", "Entity").replace(" | ", "|"),
        DOG.replace("| - |", "|  |"),
    ],
    ids=["with chatter", "as a table", "spelled otherwise", "nothing for a dash"],
)
def test_the_same_answer_in_another_dress_is_read_alike(written: str) -> None:
    assert parse_facts(written) == parse_facts(DOG)


@pytest.mark.parametrize(
    "line",
    [
        "5 | attribute | 9 | Is the dog big?",
        "5 | attribute | 5 | Is the dog big?",
        "5 | attribute | 1; 2 | Is the dog big?",
        "3 | attribute | 1 | Is the dog big?",
        "five | attribute | 1 | Is the dog big?",
        "5 | mood | 1 | Is the dog glad?",
        "5 | attribute | 1 | The dog is big",
        "5 | attribute | 1 | What colour is the dog?",
        "5 | attribute | 1",
        "5 | attribute | 1 | Is the dog",
    ],
)
def test_one_line_out_of_form_spoils_the_answer(line: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_facts(f"{DOG}\n{line}")


@pytest.mark.parametrize("answer", ["", "A brown dog chases two cats.", "Is there a dog?\nIs it brown?"])
def test_an_answer_without_facts_is_none(answer: str) -> None:
    with pytest.raises(ValueError, match="expected lines with four fields"):
        parse_facts(answer)


def test_the_instruction_shows_the_form_that_is_read() -> None:
    shown = parse_facts(INSTRUCTION.partition("the answer is:")[2])
    assert [fact.needs for fact in shown] == [(), (), (0,), (1,), (0, 1)]


# ---- the score


def test_a_fact_counts_only_if_what_it_needs_holds() -> None:
    facts = parse_facts(DOG)
    assert score_of([0.9, 0.8, 0.6, 0.7], facts, "mean") == pytest.approx(3 / 4)
    assert score_of([0.2, 0.8, 0.9, 0.9], facts, "mean") == pytest.approx((0.2 + 0.8) / 4), (
        "no dog: not brown, no chase"
    )
    chain = (Fact("a"), Fact("b", (0,)), Fact("c", (1,)))
    assert score_of([0.1, 0.9, 0.9], chain, "mean") == pytest.approx(0.1 / 3), (
        "what needs a fact that counts 0 counts 0"
    )
    assert score_of([0.9, 0.8, 0.3, 0.7], facts, "least") == 0.3
    assert all(math.isnan(score_of([0.9, math.nan, 1, 1], facts, how)) for how in ("mean", "least"))


# ---- a language model in this process, which answers nothing of use


def batch(prompts: list[str], **columns: np.ndarray) -> Batch:
    blank = {name: texts([""] * len(prompts)) for name in ("error_type", "error", "error_stage")}
    return {"sample_id": texts(list(map(str, range(len(prompts))))), "prompt": texts(prompts), **blank, **columns}


@pytest.fixture
def model(tiny_pack: Path) -> LanguageRef:
    return LanguageRef(str(tiny_pack / "expander"), key="judge.decompose.model")


PROMPTS = ["a red circle", "two cats walk", "a red circle"]


def test_the_model_is_asked_greedily_and_answers_as_it_does_alone(model: LanguageRef) -> None:
    language = load_language(model)
    together = language.answer(PROMPTS[:2], "Split {prompt}", 6)
    assert together == [language.answer([prompt], "Split {prompt}", 6)[0] for prompt in PROMPTS[:2]]
    assert language.answer(["word " * 10_000, "fire"], "{prompt}", 6)[0] == "", "longer than the model reads"


def test_what_does_not_parse_is_counted_and_kept(model: LanguageRef, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    stage = DecomposePrompts("f1", model, max_new_tokens=6, cache=storage)
    stage.load()
    with capture_logs() as logs:
        out, _ = run_stage(stage, batch(PROMPTS))
    assert [(line["log_level"], line["prompts"], line["of"]) for line in logs] == [("warning", 2, 2)]
    assert load_json(out["decomposed"]) == [[], [], []] and set(out["error_type"]) == {""}
    kept = [json.loads(storage.read_bytes(name)) for name in storage.files(FOLDER)]
    assert sorted(each["prompt"] for each in kept) == sorted(set(PROMPTS)), "once for each distinct prompt"
    assert all(each["facts"] == [] for each in kept)


def test_what_was_written_once_is_asked_again_by_whoever_comes_later(model: LanguageRef, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    DecomposePrompts("f2", model, max_new_tokens=6, cache=storage)(batch(PROMPTS[:1]))
    (name,) = storage.files(FOLDER)
    kept = json.loads(storage.read_bytes(name)) | {"facts": [{"question": "Is it red?", "needs": []}]}
    storage.write_bytes(name, json.dumps(kept).encode())
    nowhere = LanguageRef(str(tmp_path / "gone"))
    later = DecomposePrompts("f2", nowhere, max_new_tokens=6, cache=storage)
    assert load_json(later(batch(PROMPTS[:1]))["decomposed"]) == [[{"question": "Is it red?", "needs": []}]] != [[]]
    with pytest.raises(UserError, match="cannot be loaded"):  # asked by another fingerprint, the model is needed
        replace(later, fingerprint="f3")(batch(PROMPTS[:1]))


def test_a_model_that_is_none_is_named_by_its_key(tmp_path: Path, tiny_pack: Path) -> None:
    shutil.copytree(tiny_pack / "expander", tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^judge.decompose.model: .*cannot be loaded as a language model"):
        DecomposePrompts("f", LanguageRef(str(tmp_path / "lm"), key="judge.decompose.model")).load()


# ---- one's own code


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(function: Any, fingerprint: str = "c", **settings: Any) -> DecomposePrompts:
        module = ModuleType("mine")
        module.split = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mine", module)
        return DecomposePrompts(fingerprint, call="mine:split", **settings)

    return install


def test_code_is_asked_once_for_each_prompt_and_cut_to_the_most_questions(call: Any) -> None:
    seen: list[str] = []

    def split(prompts: list[str]) -> list[Any]:
        seen.extend(prompts)
        return [[f"Is it {word}?" for word in prompt.split()] for prompt in prompts]

    stage = call(split, "once", max_questions=2)
    out = stage(batch(PROMPTS))
    stage(batch(PROMPTS))
    assert seen == PROMPTS[:2]
    assert load_json(out["decomposed"])[2] == [
        {"question": "Is it a?", "needs": []},
        {"question": "Is it red?", "needs": []},
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([["a?"]], "expected 3 lists of questions, found 1"),
        ({"a": 1}, "expected 3 lists of questions, found dict"),
        ([["a?"], [1], []], "expected a question or"),
        ([["a?"], [{"question": "b?", "needs": [0]}], []], "places of questions before the 0th"),
        ([["a?"], [{"text": "b?"}], []], "expected a question or"),
        ([["a?"], [""], []], "expected a question, found"),
        ([["a?"], "b?", []], "expected a list of questions, found str"),
    ],
)
def test_code_that_returns_something_else_is_refused(answer: Any, message: str, call: Any) -> None:
    with pytest.raises(UserError, match=f"^judge.decompose.call: mine:split: .*{message}"):
        call(lambda prompts: answer, message)(batch(["a", "b", "c"]))


# ---- the shapes world, whose grammar makes no error


def test_the_grammar_takes_a_scene_apart_into_facts_that_it_says() -> None:
    (facts,) = decompose(["a small red circle moving left and a blue ring spinning on a white background"])
    assert facts == [], "nobody can see a ring spin: outside of the world"
    (facts,) = decompose(["a small red circle moving left and a blue star on a white background"])
    assert [fact["question"].split('"')[1] for fact in facts] == [
        "a circle and a star",
        "a red circle and a star",
        "a circle and a blue star",
        "a small red circle and a blue star",
        "a red circle moving left and a blue star",
        "a circle and a star on a white background",
    ]
    assert all(fact["question"].startswith(WHOLE.partition("{prompt}")[0]) for fact in facts)
    assert [fact["needs"] for fact in facts] == [[], [0], [0], [1], [1], [0]]


def test_every_prompt_of_the_world_has_a_fact_for_each_thing_it_says() -> None:
    for scene in sample_scenes(stream(3, 0), 60):
        (facts,) = decompose([describe(scene, stream(4, 0))])
        values = sum(
            value is not None for figure in scene.figures for value in (figure.colour, figure.size, figure.motion)
        )
        assert len(facts) == 1 + values + len(scene.shots)
        assert all(parse(fact["question"].split('"')[1]) is not None for fact in facts)
        assert all(need < place for place, fact in enumerate(facts) for need in fact["needs"])


def test_the_judge_scores_the_facts_of_each_prompt_and_keeps_the_answers(shapes_judge: str) -> None:
    scenes = sample_scenes(stream(5, 0), 3, kinds=("one", "two", "cut"))
    prompts = [*map(describe, scenes[:2]), "a dragon on a hill"]
    frames = render(scenes, range(3))
    rubric = with_decomposed(load_rubric("default"), 0.75)
    data = DecomposePrompts("shapes", call="models.pack.decompose:decompose")(batch(prompts, frames=frames))
    judge = JudgeQuality(rubric, MultimodalRef(shapes_judge), facts="least")
    out, _ = run_stage(judge, data)
    assert set(out["error_type"]) == {""}
    model, shown = load_multimodal(judge.model), evenly_spaced(frames, 8)  # type: ignore[arg-type]
    answered = load_json(out["decomposed"])
    assert len({len(facts) for facts in answered}) == 3, "as many questions as each prompt has facts"
    assert [fact["question"] for fact in answered[2]] == [WHOLE.format(media="video", prompt=prompts[2])]
    for at, facts in enumerate(answered):
        alone = model.p_yes(shown[at : at + 1], [[fact["question"] for fact in facts]])[0]
        np.testing.assert_allclose([fact["p_yes"] for fact in facts], alone, atol=1e-5)
        scores = {score["name"]: score["value"] for score in load_json(out["scores"])[at]}
        assert scores[DECOMPOSED] == pytest.approx(alone.min(), abs=1e-5)
        assert list(scores) == ["prompt_match", "no_artefacts", "motion_smooth", DECOMPOSED]
        assert (out["verdict"][at] == "accepted") == all(
            scores[name] >= bar for name, bar in rubric.thresholds().items()
        )


@pytest.fixture(scope="module")
def shapes_judge() -> str:
    from models.source import resolve

    return resolve("pack://shapes", "judge")
