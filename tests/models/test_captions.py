"""What is made of a caption's text: statements, tags, and what is wrong with it."""

from __future__ import annotations

import pytest

from models.captions import listed, repeated, sentences, tags, trouble
from models.pack.grammar import sample_scenes
from models.pack.phrases import describe
from models.pack.train.loop import stream
from models.pack.train.questions import caption


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs. It barks!  Is it wet? Yes", ["A dog runs.", "It barks!", "Is it wet?", "Yes"]),
        ("Dr. Lee walks 3.5 km. It rains.", ["Dr. Lee walks 3.5 km.", "It rains."]),
        ('He says "Stop." Then he runs.', ['He says "Stop.', "Then he runs."]),
        ("a red circle on a white background", ["a red circle on a white background"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_lists_are_cut_at_commas_lines_and_bullets():
    assert listed("1. a Dog, - a cat\n* tree; a dog") == ["a Dog", "a cat", "tree"]
    assert listed("- red car - blue car 2) sky-high tower") == ["red car", "blue car", "sky-high tower"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Dog, beach,  Running dog,dog.", ["beach", "dog", "running dog"]),
        ("The video shows a small dog on the white sand of a beach", ["beach", "small dog", "white sand"]),
        ("the sea, a sunset", ["sea", "sunset"]),
        ("... , ;", []),
    ],
)  # fmt: skip
def test_tags_are_lower_case_unique_and_ordered(answer, expected):
    assert tags(answer) == expected
    assert tags(", ".join(expected)) == expected


@pytest.mark.parametrize(
    ("style", "text", "wrong"),
    [
        ("short", "", "near-empty"),
        ("short", "A dog.", "near-empty"),
        ("dense", "A dog runs fast.", "near-empty"),
        ("short", "A dog runs.", ""),
        ("tags", "dog", ""),
        ("tags", "", "near-empty"),
        ("structured", "", "near-empty"),
        ("short", "As an AI language model, I am unable to view this video.", "boiler-plate"),
        ("short", "I'm sorry, there is nothing that I can tell.", "boiler-plate"),
        ("short", "Sure, here is a description of the video: a dog runs.", "boiler-plate"),
        ("dense", "Here's a detailed description of the image you gave me.", "boiler-plate"),
        ("short", "The image shows a scene.", "boiler-plate"),
        ("short", "The image shows a dog that runs.", ""),
        ("short", "Okay signs hang over the door.", ""),
        ("dense", "A dog runs on the beach and " + "a dog runs on the beach and " * 4, "repetitive"),
        ("short", "red red red red red red red", "repetitive"),
        ("dense", "A red car stands left of the house, and a blue car stands right of the house.", ""),
    ],
)
def test_trouble(style, text, wrong):
    assert trouble(style, text) == wrong


def test_no_caption_of_the_shapes_world_is_troubled():
    rng = stream(3, 0)
    for scene in sample_scenes(rng, 600):
        for text in (describe(scene, rng), caption(scene), caption(scene, dense=True)):
            assert trouble("dense", text) == "", text


def test_repeated_is_the_share_of_words_that_stood_there_before():
    assert repeated(["a", "b", "c", "d", "e", "f"]) == 0
    assert repeated(["a", "b", "c", "d", "a", "b", "c", "d"]) == 0.5
    assert repeated(["a", "a", "a", "a", "b", "c"]) == pytest.approx(4 / 6)
    assert repeated([]) == 0
