from __future__ import annotations

import time
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import pytest

from pipelines.identity import Input, Shape, generator_id, prompt_id, sample_id, sample_ids

SHAPE = Shape(64, 64, 17, 8)
FRAME = Input("first_frame", "a.png", "ab" * 32)
CLIP = Input("video", "v.mp4", "cd" * 32, 0.5, 2)
EVERYTHING: dict[str, Any] = {
    "inputs": (FRAME, CLIP),
    "negative_prompt": "blurry",
    "shape": Shape(480, 832, 81, 16.0),
    "seed": 2**63 - 1,
    "own_id": "x-1",
    "expander": "ef" * 16,
    "variant": 3,
}


def test_prompt_id_golden() -> None:
    assert prompt_id("a red circle", shape=SHAPE, seed=0) == "ad5db3e7d36228706ffdc22373e0535c"
    assert prompt_id("ein Ärger \U0001f600", **EVERYTHING) == "706c0b0a8131f78cdcec813d472320a5"


def test_generator_id_golden() -> None:
    adapters = [("cd" * 32, 1), ("ef" * 32, 0.1)]
    assert generator_id("ab" * 32, adapters, 2) == "245a15689656d7045b416405366619b6"
    assert generator_id("ab" * 32) == "5ded4c08386c25b331099d3f5a8e9ded"


def test_sample_id_golden() -> None:
    generator = "245a15689656d7045b416405366619b6"
    assert sample_id("00" * 16, 0, generator, "11" * 16) == "677d8b043652f44004c21109e73129a9"
    assert sample_id("00" * 16, 7, generator, "11" * 16) == "dcdb6709233036d0c652c8ae48df8820"


def test_sample_ids_is_the_documented_encoding() -> None:
    prompts = [f"{at:032x}" for at in range(5)]
    expected = [
        blake2b(f"ditmill/sample/v1\ngen\nplan\n12\n{prompt}".encode(), digest_size=16).hexdigest()
        for prompt in prompts
    ]
    assert sample_ids(prompts, 12, "gen", "plan") == expected


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a red  circle"},
        {"inputs": (CLIP, FRAME)},
        {"inputs": (FRAME,)},
        {"inputs": (replace(FRAME, role="last_frame"), CLIP)},
        {"inputs": (FRAME, replace(CLIP, start=0.25))},
        {"negative_prompt": ""},
        {"shape": Shape(480, 832, 81, 24.0)},
        {"shape": Shape(832, 480, 81, 16.0)},
        {"seed": 0},
        {"own_id": ""},
        {"expander": ""},
        {"variant": 4},
    ],
    ids=str,
)
def test_prompt_id_depends_on(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"prompt": "a red circle", **EVERYTHING}
    assert prompt_id(**base) != prompt_id(**{**base, **change})


def test_prompt_id_of_inputs_is_their_content_not_their_place() -> None:
    moved = replace(FRAME, uri="s3://elsewhere/b.png")
    assert prompt_id("p", inputs=(FRAME,), shape=SHAPE, seed=0) == prompt_id("p", inputs=(moved,), shape=SHAPE, seed=0)
    unread = [replace(one, sha256="") for one in (FRAME, moved)]
    ids = {prompt_id("p", inputs=(one,), shape=SHAPE, seed=0) for one in unread}
    assert len(ids) == 2


def test_prompt_id_does_not_tell_whole_numbers_from_floats() -> None:
    assert prompt_id("p", shape=Shape(64, 64, 17, 8), seed=0) == prompt_id("p", shape=Shape(64, 64, 17, 8.0), seed=0)


def test_prompt_id_takes_a_lone_surrogate() -> None:
    assert prompt_id("\ud800", shape=SHAPE, seed=0) != prompt_id("\udc80", shape=SHAPE, seed=0)


def test_generator_id_depends_on_order_and_weight_of_adapters() -> None:
    one, other = ("cd" * 32, 1.0), ("ef" * 32, 0.5)
    ids = [
        generator_id("ab", adapters, steps)
        for adapters, steps in (
            ([one, other], 0),
            ([other, one], 0),
            ([one], 0),
            ([("cd" * 32, 0.9)], 0),
            ([one], 1),
            ([], 0),
        )
    ]
    assert len(set(ids)) == len(ids)


def test_generator_id_depends_on_the_teacher_and_its_guidance() -> None:
    teachers = (None, ("cd" * 32, 1.75), ("cd" * 32, 2.0), ("ef" * 32, 1.75))
    assert len({generator_id("ab", (), 1, teacher) for teacher in teachers}) == 4
    assert generator_id("ab" * 32, (), 1, ("cd" * 32, 2)) == "2c0a2f03a506c74aa64b09c3a2ee3009"


@pytest.mark.parametrize("ids", [("a\nb", "c"), ("a", "b\nc")])
def test_sample_ids_refuses_an_ambiguous_id(ids: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="expected one line"):
        sample_ids(["p"], 0, *ids)


def test_sample_ids_of_ten_million_prompts_would_take_less_than_twenty_seconds() -> None:
    prompts = [f"{at:032x}" for at in range(200_000)]
    started = time.process_time()
    assert len(set(sample_ids(prompts, 0, "aa" * 16, "bb" * 16))) == len(prompts)
    assert (time.process_time() - started) / len(prompts) * 10_000_000 < 20
