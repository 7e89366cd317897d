from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from infra.errors import UserError
from models.captions import sentences
from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
from models.pack.grammar import sample_scenes
from models.pack.phrases import describe
from models.pack.train.loop import stream
from models.pack.train.questions import changed
from models.pack.world import render
from models.source import resolve
from stages.batch import Batch, load_json, texts
from stages.caption import INSTRUCTIONS, TEMPERATURE, VERIFY, CaptionMedia, Draft, statements, without
from stages.caption_schema import is_valid, load_schema
from stages.judge import JudgeQuality
from stages.rubric import load_rubric


def batch(num_frames: int) -> Batch:
    coarse = np.random.default_rng(0).integers(0, 256, (3, num_frames, 4, 4, 3), dtype=np.uint8)
    return {"prompt": texts(["a", "b", "c"]), "frames": coarse.repeat(16, axis=2).repeat(16, axis=3)}


@pytest.fixture
def ref(tiny_pack):
    return MultimodalRef(str(tiny_pack / "judge"))


@pytest.mark.parametrize(("num_frames", "media"), [(9, "video"), (1, "image")])
def test_caption_writes_each_style(ref, num_frames, media):
    stage = CaptionMedia(ref, ("dense", "short"), max_new_tokens=5, num_frames=4, label="pack://tiny")
    stage.load()
    out = stage(batch(num_frames))
    shown = batch(num_frames)["frames"][:, [0, 3, 5, 8] if num_frames > 1 else [0]]
    instructions = [INSTRUCTIONS[style].format(media=media) for style in ("dense", "short")]
    expected = load_multimodal(ref).caption(shown, instructions, 5)
    for row, (dense, short) in zip(load_json(out["captions"]), expected, strict=True):
        common = {"language": "en", "scene": 0, "model": "pack://tiny"}
        assert row == [{"style": "dense", "text": dense, **common}, {"style": "short", "text": short, **common}]
    assert list(out["caption"]) == [dense for dense, _ in expected]
    assert all(out["caption"])


def test_caption_and_judge_share_a_model(ref):
    load_multimodal.cache_clear()
    CaptionMedia(ref).load()
    JudgeQuality(load_rubric("default"), ref).load()
    assert load_multimodal.cache_info().misses == 1


@pytest.fixture(scope="module")
def shapes():
    return MultimodalRef(resolve("pack://shapes", "judge"))


def world(count: int, kind: str = "one", place: int = 20) -> tuple[Batch, list]:
    scenes = sample_scenes(stream(place, 0), count, kinds=(kind,), split="held_out")
    return {"prompt": texts([describe(scene) for scene in scenes]), "frames": render(scenes, range(count))}, scenes


def captions_of(out: Batch, row: int, scene: int = 0) -> dict[str, str]:
    return {item["style"]: item["text"] for item in load_json(out["captions"])[row] if item["scene"] == scene}


def test_tags_and_json_are_what_they_are_called(shapes):
    schema = load_schema(None, True)
    out = CaptionMedia(shapes, ("tags", "structured"), max_new_tokens=24, schema=schema)(world(3)[0])
    for row in range(3):
        said = captions_of(out, row)
        tags = said["tags"].split(", ")
        assert tags == sorted({tag.lower() for tag in tags}) and all(tags)
        assert is_valid(json.loads(said["structured"]), schema)
        assert out["caption"][row] == said["tags"]


def test_a_caption_that_never_validates_is_none_and_the_sample_lives(shapes, capsys):
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 0}}, "required": ["a"]}
    out = CaptionMedia(shapes, ("structured", "short"), schema=json.dumps(schema))(world(2)[0])
    assert [captions_of(out, row)["structured"] for row in range(2)] == ["", ""]
    assert list(out["caption"]) == [captions_of(out, row)["short"] for row in range(2)] and all(out["caption"])
    assert "no caption" in "".join(capsys.readouterr())


def test_each_scene_is_captioned_from_its_own_frames(shapes):
    batch, _ = world(3, "cut")
    middle = batch["frames"].shape[1] // 2
    plan = {"blocks": [2, 1], "scenes": ["||", 0]}  # 17 frames are 5 latent ones, which is two blocks and a context
    prompts = ["a || b", "a || b", "one scene only"]
    stage = CaptionMedia(shapes, ("short",), plan_json=json.dumps(plan))
    out = stage(batch | {"prompt": texts(prompts)})
    assert [[item["scene"] for item in row] for row in load_json(out["captions"])] == [[0, 1, 2], [0, 1, 2], [0]]
    plain = CaptionMedia(shapes, ("short",))
    assert list(out["caption"]) == list(plain(batch)["caption"])
    for part, frames in ((1, batch["frames"][:2, : middle + 1]), (2, batch["frames"][:2, middle + 1 :])):
        expected = list(plain({"prompt": batch["prompt"][:2], "frames": frames})["caption"])
        assert [captions_of(out, row, part)["short"] for row in range(2)] == expected
    stored = batch | {"prompt": texts(prompts), "plan_json": texts(["{}", json.dumps(plan), "{}"])}
    assert [len(row) for row in load_json(plain(stored)["captions"])] == [1, 3, 1], "a stored sample has its own plan"


def test_the_verifier_leaves_out_what_is_not_so(shapes):
    batch, scenes = world(12)
    rng = stream(21, 0)
    frames = evenly_spaced(batch["frames"], 8)
    true, false = [f"{describe(each)}." for each in scenes], [f"{describe(changed(each, rng))}." for each in scenes]
    found = [{"dense": f"{a} {b}", "tags": b.strip(".")} for a, b in zip(true, false, strict=True)]
    drafts = CaptionMedia(shapes, verify=0.5)._verified(frames, found, "video")
    left = [sentences(draft["dense"].text) for draft in drafts]
    assert np.mean([one in kept for one, kept in zip(true, left, strict=True)]) >= 0.75
    assert np.mean([one in kept for one, kept in zip(false, left, strict=True)]) <= 0.25
    for kept, draft in zip(left, drafts, strict=True):
        assert draft["dense"].trouble == ("" if kept else "unsupported")
        assert draft["dense"].supported >= 0.5 or not kept
    unverified = CaptionMedia(shapes)._verified(frames, found, "video")
    assert [draft["dense"].text for draft in unverified] == [some["dense"] for some in found]


def test_nothing_is_left_of_a_caption_that_no_verifier_can_support(shapes):
    batch, _ = world(2)
    out = CaptionMedia(shapes, ("short",), verify=1.0)(batch)
    assert list(out["caption"]) == ["", ""]
    assert [captions_of(out, row) for row in range(2)] == [{"short": ""}] * 2


def test_the_verifier_is_another_model_where_one_is_given(shapes, ref):
    batch, _ = world(2)
    own = CaptionMedia(shapes, ("short",), verify=0.3)
    other = replace(own, verifier=ref)  # random weights: its P(yes) are not the trained model's
    frames = evenly_spaced(batch["frames"], 8)
    found = [{"short": text} for text in batch["prompt"]]
    mine, theirs = own._verified(frames, found, "video"), other._verified(frames, found, "video")
    asked = [[VERIFY.format(media="video", statement=text)] for text in batch["prompt"]]
    for drafts, model in ((mine, shapes), (theirs, ref)):
        p_yes = load_multimodal(model).p_yes(frames, asked)[:, 0]
        for draft, p in zip(drafts, p_yes, strict=True):
            assert draft["short"].supported == pytest.approx(p if p >= 0.3 else 0, abs=1e-5)


def test_what_is_near_empty_is_written_once_more_and_the_better_is_kept(shapes):
    """Three tokens are no dense caption, however often."""
    batch, _ = world(3)
    stage = CaptionMedia(shapes, ("dense", "short"), max_new_tokens=3)
    frames = evenly_spaced(batch["frames"], 8)
    first = stage._write(frames, [{"dense": "", "short": ""}] * 3, 0.0)
    second = stage._write(frames, [{"dense": "near-empty"}] * 3, TEMPERATURE)
    assert {draft["dense"].trouble for draft in first + second} == {"near-empty"}
    assert {draft["short"].trouble for draft in first} == {""}
    out = stage(batch)
    assert [captions_of(out, row)["short"] for row in range(3)] == [draft["short"].text for draft in first]
    assert [captions_of(out, row)["dense"] for row in range(3)] == [draft["dense"].text for draft in first]


def test_a_sound_draft_is_better_than_a_long_one_and_any_text_than_none():
    sound, supported = Draft("a b c", "", 0.2), Draft("a b d", "", 0.9)
    empty, chatter = Draft("", "near-empty"), Draft("Sure, a b c", "boiler-plate")
    assert sorted([supported, chatter, sound, empty], key=lambda each: each.worth) == [empty, chatter, sound, supported]


def test_a_second_answer_is_another_one_and_the_same_for_a_clip_wherever_it_stands(ref):
    model = load_multimodal(ref)
    frames = batch(4)["frames"]
    asked = [["Describe this video.", "Describe it again."]] * 3
    greedy, drawn = model.answer(frames, asked, 8), model.answer(frames, asked, 8, TEMPERATURE)
    assert drawn != greedy
    assert drawn == model.answer(frames, asked, 8, TEMPERATURE)
    assert [drawn[2], drawn[0]] == model.answer(frames[[2, 0]], asked[:2], 8, TEMPERATURE)
    assert drawn[1][1:] == model.answer(frames[1:2], [asked[0][1:]], 8, TEMPERATURE)[0]


def test_statements_can_be_taken_out():
    text = json.dumps(
        {"things": [{"name": "dog", "looks": ["small", "red"]}, {"name": "cat", "looks": []}], "sky": "blue"}
    )
    assert statements("structured", text) == ["dog, small, red", "cat"]
    assert json.loads(without("structured", text, {"cat"})) == {
        "things": [{"name": "dog", "looks": ["small", "red"]}],
        "sky": "blue",
    }
    assert without("tags", "beach, dog, sea", {"dog"}) == "beach, sea"
    assert without("dense", "A dog runs. It is red. It barks.", {"It is red."}) == "A dog runs. It barks."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read as JSON"),
        ('{"type": "object", "const": NaN}', "cannot be read as JSON"),
        ('{"type": "object", "title": "\\ud83d"}', "cannot be read as JSON"),
        ("[]", 'expected {"type": "object", ...}'),
        ('{"type": "object", "properties": {"a": {"type": "strin"}}}', r"\$.properties.a.type"),
        ('{"type": "object", "properties": {"a": {"$ref": "https://example.org/a"}}}', "leads out of it"),
        ('{"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}', "a has no single type"),
        ('{"type": "object"}', "has no properties"),
        ('{"type": "object", "properties": {"a": {"type": "string", "enum": []}}}', "a has an empty enum"),
    ],
)
def test_a_broken_schema_is_one_line_that_names_the_key(tmp_path, text, said):
    file = tmp_path / "form.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_schema(str(file), True)
    assert str(caught.value).startswith("caption.json_schema: ") and "\n" not in str(caught.value)


def test_an_endpoint_may_be_given_any_schema(tmp_path):
    file = tmp_path / "form.json"
    file.write_text(
        '{"type": "object", "$defs": {"t": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/t"}}}'
    )
    schema = load_schema(str(file), False)
    assert is_valid({"a": "b"}, schema) and not is_valid({"a": 1}, schema)
