from __future__ import annotations

import pickle

import pytest

from infra.errors import UserError
from stages.rubric import (
    PROMPT_CHARACTERS,
    Question,
    built_in_rubrics,
    check_thresholds,
    load_rubric,
    parts_of,
    with_decomposed,
)

GOOD = """
name: mine
questions:
  - {name: hands, text: 'Are the hands in this {media} right? {prompt} Yes or No?', threshold: 0.7, weight: 3}
  - {name: still, text: 'Is it sharp?', media: image}
"""


@pytest.fixture
def rubric(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    return load_rubric(str(tmp_path / "mine.yaml"))


def test_load_rubric_reads_questions_and_defaults(rubric):
    hands, still = rubric.questions
    assert (rubric.name, hands.threshold, hands.weight, still.threshold, still.weight) == ("mine", 0.7, 3, 0.5, 1)
    assert rubric.thresholds({"still": 0.9}) == {"hands": 0.7, "still": 0.9}
    assert hash(pickle.loads(pickle.dumps(rubric))) == hash(rubric)


def test_default_rubric_asks_about_prompt_artefacts_and_motion():
    rubric = load_rubric("default")
    assert [question.name for question in rubric.questions if question.asked(17)] == [
        "prompt_match",
        "no_artefacts",
        "motion_smooth",
    ]
    assert [question.name for question in rubric.questions if question.asked(1)] == ["prompt_match", "no_artefacts"]
    assert '"a red cat"' in rubric.questions[0].format("a red cat", 1)
    assert all("Yes or No" in question.format("", 17) for question in rubric.questions)


def test_question_quotes_the_prompt_as_data(rubric):
    hands = rubric.questions[0]
    assert hands.format("{media} {0} a\n cat", 17) == "Are the hands in this video right? {media} {0} a cat Yes or No?"
    assert len(hands.format("x" * 100_000, 1)) < PROMPT_CHARACTERS + 100


def test_rubric_hash_changes_with_any_question(rubric, tmp_path):
    hashes = {rubric.sha256}
    changes = {"0.7": "0.6", "weight: 3": "weight: 2", "sharp": "blurred", "hands,": "feet,", "image": "video"}
    for old, new in changes.items():
        (tmp_path / "mine.yaml").write_text(GOOD.replace(old, new))
        hashes.add(load_rubric(str(tmp_path / "mine.yaml")).sha256)
    assert len(hashes) == 6
    (tmp_path / "mine.yaml").write_text(GOOD + "# a comment\n")
    assert load_rubric(str(tmp_path / "mine.yaml")).sha256 == rubric.sha256


def test_hash_of_what_is_asked_leaves_out_how_it_is_weighed(rubric, tmp_path):
    def asked(old: str, new: str) -> str:
        (tmp_path / "mine.yaml").write_text(GOOD.replace(old, new))
        return load_rubric(str(tmp_path / "mine.yaml")).questions_sha256

    assert {asked("0.7", "0.6"), asked("weight: 3", "weight: 2")} == {rubric.questions_sha256}
    assert (
        len({rubric.questions_sha256, asked("sharp", "blurred"), asked("hands,", "feet,"), asked("image", "video")})
        == 4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is not YAML"),
        ("- a", "expected name and questions, found list"),
        ("name: mine", "questions: is needed and missing"),
        ("questions: []", "questions: at least one question is needed"),
        ("questions: [{text: Is it good}]", "questions.0.name: is needed and missing"),
        (
            "questions: [{name: good, text: '{subject}?'}]",
            "questions.0.text: takes {prompt}, {media}, {negative_prompt}, {tags} and {extra.COLUMN}, and no {subject}",
        ),
        ("questions: [{name: good, text: '{prompt'}]", "questions.0.text: is no template"),
        (
            "questions: [{name: good, text: a, threshold: 50}]",
            "questions.0.threshold: Input should be less than",
        ),
        ("questions: [{name: good, text: a, treshold: 0.5}]", "questions.0.treshold: unknown key"),
        (
            "questions: [{name: good, text: a, media: audio}]",
            "questions.0.media: Input should be 'any', 'video' or 'image'",
        ),
        ("questions: [{name: good, text: a}, {name: good, text: b}]", "questions: two questions have the name good"),
    ],
)
def test_load_rubric_names_the_key_that_is_wrong(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_rubric(str(path))
    assert str(raised.value).startswith(f"judge.rubric: {path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_load_rubric_lists_what_is_built_in():
    with pytest.raises(
        UserError,
        match=r"^judge.rubric: nothing: cannot be read .*; give one of artefacts, consistency, default, footage, motion,"
        r" people, prompt_match, safety, text, or a YAML file$",
    ):
        load_rubric("nothing")


# ---- several rubrics


def test_all_built_in_rubrics_can_be_asked_together():
    names = [name for name in built_in_rubrics() if name != "footage"]
    asked = {question.name: question for question in load_rubric("default").questions}
    assert all(question == asked[question.name] for question in load_rubric("footage").questions)  # a part of it
    rubric = load_rubric(names)
    assert rubric.name == "artefacts+consistency+default+motion+people+prompt_match+safety+text"
    assert rubric.questions == tuple(question for name in names for question in load_rubric(name).questions)
    assert all(question.text.endswith(" Answer Yes or No.") for question in rubric.questions)
    assert all("video" not in question.text or question.media == "video" for question in rubric.questions)


def test_a_list_of_one_rubric_is_that_rubric():
    assert load_rubric(["people"]) == load_rubric("people")


def test_hash_of_several_rubrics_changes_with_any_of_them(rubric, tmp_path):
    mine = str(tmp_path / "mine.yaml")
    hashes = {load_rubric(names).questions_sha256 for names in (["default"], ["default", mine], ["default", "people"])}
    (tmp_path / "mine.yaml").write_text(GOOD.replace("sharp", "blurred"))
    assert len(hashes | {load_rubric(["default", mine]).questions_sha256}) == 4


def test_two_rubrics_that_ask_under_one_name_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("questions: [{name: prompt_match, text: 'Is it {prompt}?'}]")
    message = r"^judge.rubric: default and mine both ask prompt_match; drop or rename one$"
    with pytest.raises(UserError, match=message):
        load_rubric(["default", str(tmp_path / "mine.yaml")])
    for twice in ("people", str(tmp_path / "mine.yaml")):
        with pytest.raises(UserError, match=r"^judge.rubric: (people|mine) and \1 both ask (faces_right|prompt_match)"):
            load_rubric([twice, twice])


def test_the_question_of_decomposed_facts_has_a_threshold_like_any_other(rubric):
    both = with_decomposed(rubric, 0.8)
    assert both.thresholds() == {"hands": 0.7, "still": 0.5, "decomposed": 0.8} and both.name == rubric.name
    check_thresholds(both, {"decomposed": 0.9})
    with pytest.raises(UserError, match=r"^judge.rubric: mine has a question decomposed, which judge.decompose adds"):
        with_decomposed(both, 0.8)


# ---- parts of the record


def test_a_question_quotes_what_the_record_brought_and_is_not_asked_without():
    question = Question(name="q", text="{media}: no {negative_prompt}, {tags}, by {extra.the artist} {{}}")
    parts = parts_of("hats,\n caps", ["a", "b"], {"the artist": "{prompt}", "other": 1})
    assert question.takes == {"negative_prompt", "tags", "extra.the artist"}
    assert question.asked(17, parts)
    assert question.format("x", 17, parts) == "video: no hats, caps, a, b, by {prompt} {}"
    assert not any(
        question.asked(17, {key: text for key, text in parts.items() if key != left_out}) for left_out in question.takes
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a  b", "a b"),
        (3, "3"),
        (0, "0"),
        (False, "false"),
        (["a", None, 2], "a, 2"),
        ({"b": 1, "a": "é"}, '{"a": "é", "b": 1}'),
        ("x" * 5000, "x" * PROMPT_CHARACTERS),
        *[(empty, None) for empty in ("", " \n", None, [], {}, [None, ""])],
    ],
)
def test_a_column_is_quoted_as_text_or_is_not_there(value, text):
    assert parts_of("", [], {"column": value}).get("extra.column") == text


def test_what_the_judge_itself_wrote_is_no_part_of_the_record():
    assert parts_of("", [], {"decomposed": [{"question": "a?"}]}) == {}


@pytest.mark.parametrize("text", ["{extra}", "{extra.}", "{}", "{0}", "{prompt.a}", "{extra.a:3}", "{tags!r}"])
def test_a_template_takes_no_other_field(text):
    with pytest.raises(ValueError, match="takes"):
        Question(name="q", text=text)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"hand": 0.5}, "judge.thresholds.hand: rubric mine has no such question; it has hands, still"),
        ({"hands": 1.5}, "judge.thresholds.hands: expected a probability between 0 and 1, found 1.5"),
    ],
)
def test_check_thresholds_refuses(thresholds, message, rubric):
    with pytest.raises(UserError) as raised:
        check_thresholds(rubric, thresholds)
    assert str(raised.value) == message


def test_what_stored_samples_alone_have_is_no_part():
    """A licence is a column of a running sample and stands in `extra` of a stored one: both are asked the same."""
    assert parts_of("", [], {"licence": "cc0", "decomposed": [], "place": "Rome"}) == {"extra.place": "Rome"}
