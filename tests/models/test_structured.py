"""JSON made of answers, by the trained model of the pack and by a random one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from models.captions import listed
from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack.grammar import BACKGROUNDS, COLOURS, sample_scenes
from models.pack.train.loop import stream
from models.pack.world import render
from models.source import resolve
from models.structured import Question, _together, fill, is_strict, problem
from stages.caption_schema import BUILT_IN

WORLD = {
    "type": "object",
    "required": ["background", "colours", "world"],
    "properties": {
        "background": {"enum": list(BACKGROUNDS), "description": "Is the background {value}?"},
        "colours": {
            "type": "array",
            "description": "Does this {media} show a {value} shape?",
            "items": {"enum": list(COLOURS)},
        },
        "world": {"const": "shapes"},
    },
}


@pytest.fixture(scope="module")
def judge() -> Multimodal:
    return Multimodal(MultimodalRef(resolve("pack://shapes", "judge")))


def test_leaves_are_what_the_clip_shows(judge):
    scenes = sample_scenes(stream(11, 0), 16, kinds=("one",), split="held_out")
    frames = evenly_spaced(render(scenes, range(16)), 8)
    values = fill(judge, frames, WORLD, 8)
    assert all(list(value) == ["background", "colours", "world"] and value["world"] == "shapes" for value in values)
    right = [value["background"] == scene.shots[0].background for value, scene in zip(values, scenes, strict=True)]
    assert np.mean(right) >= 0.9
    assert fill(judge, frames[3:5], WORLD, 8) == values[3:5], "it depends on the clips beside it"


def test_a_list_of_objects_has_one_for_each_item_of_the_answer(judge):
    frames = evenly_spaced(render(sample_scenes(stream(12, 0), 2, kinds=("two",)), range(2)), 4)
    schema = json.loads(BUILT_IN.read_text())
    for value, (asked,) in zip(
        fill(judge, frames, schema, 24),
        judge.answer(
            frames,
            [["Which people, animals and things does this video show? Answer with a list, separated by commas."]] * 2,
            24,
        ),
        strict=True,
    ):
        Draft202012Validator(schema).validate(value)
        assert [subject["name"] for subject in value["subjects"]] == listed(asked)[:8]


def test_any_model_gives_the_types_that_the_schema_asks_for(tiny_pack):
    model = Multimodal(MultimodalRef(str(tiny_pack / "judge")))
    schema = {
        "type": "object",
        "required": ["seen"],
        "additionalProperties": False,
        "properties": {
            "seen": {"type": "boolean"},
            "count": {"type": "integer"},
            "share": {"type": "number"},
            "note": {"type": "string"},
            "things": {"type": "array", "maxItems": 2.0, "items": {"type": "string"}},
            "colours": {"type": "array", "maxItems": 1.0, "items": {"enum": ["red", "blue"]}},
        },
    }
    frames = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32, 3), dtype=np.uint8)
    for value in fill(model, frames, schema, 6):
        Draft202012Validator(schema).validate(value)


def test_questions_of_all_parts_are_asked_in_as_few_rounds_as_the_deepest_has():
    def part(name, rounds):
        heard = []
        for at in range(rounds):
            heard += yield [Question(f"{name}{at}", True)] * (at + 1)
        return heard

    rounds, answers = [], None
    both = _together([part("a", 1), part("b", 2), part("c", 0)])
    while True:
        try:
            asked = both.send(answers)
        except StopIteration as end:
            assert end.value == [["a0"], ["b0", "b1", "b1"], []]
            break
        rounds.append([question.text for question in asked])
        answers = rounds[-1]
    assert rounds == [["a0", "b0"], ["b1", "b1"]]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (7, "the schema is no object"),
        ({"type": "object"}, "the schema has no properties"),
        ({"type": "object", "properties": {"a": {"$ref": "#/b"}}}, "a has no single type"),
        ({"type": "object", "properties": {"a": {"type": ["string", "null"]}}}, "a has no single type"),
        ({"type": "object", "properties": {"a": {"type": "array"}}}, "a[] is no object"),
        ({"type": "object", "properties": {"a": {"type": "string", "enum": []}}}, "a has an empty enum"),
        ({"type": "array", "items": {"type": "string", "enum": []}}, "[] has an empty enum"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}}, "neither text nor"),
        (
            {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
            "a first property that is no text",
        ),
    ],
)
def test_a_schema_that_cannot_be_filled_in_is_said_to_be_one(schema, said):
    assert said in (problem(schema) or "")


def test_strict_is_a_schema_that_requires_all_and_allows_no_more():
    built_in = json.loads(BUILT_IN.read_text())
    assert problem(built_in) is None and is_strict(built_in)
    assert problem(WORLD) is None and not is_strict(WORLD)
    built_in["properties"]["subjects"]["items"]["required"].pop()
    assert not is_strict(built_in)
