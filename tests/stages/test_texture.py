from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from models.pack.grammar import sample_scenes
from models.pack.world import render
from stages.batch import SampleError, load_json, texts
from stages.clip import read
from stages.texture import MEASURED, ScoreTexture, measure_texture, text_lines

H, W = 360, 640


def noise(blur: float, seed: int = 0, height: int = H, width: int = W) -> np.ndarray:
    plane = np.random.default_rng(seed).standard_normal((height, width))
    plane = cv2.GaussianBlur(plane, (0, 0), blur) if blur else plane
    plane = (plane - plane.min()) / np.ptp(plane) * 255
    return np.repeat(plane.astype(np.uint8)[..., None], 3, axis=2)


def written_on(ground: np.ndarray, size: int, outline: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two lines of white writing, and where they are: boolean [H, W]."""
    image = Image.fromarray(ground.copy())
    draw, font, where = ImageDraw.Draw(image), ImageFont.load_default(size), np.zeros(ground.shape[:2], bool)
    for line in range(2):
        place = (30, H - int(1.4 * size) * (2 - line) - 12)
        words = "The quick brown fox jumps over"
        draw.text(place, words, fill=(255, 255, 255), font=font, stroke_width=outline, stroke_fill=(0, 0, 0))
        left, top, right, bottom = draw.textbbox(place, words, font=font)
        where[int(top) : int(bottom), int(left) : int(right)] = True
    return np.asarray(image), where


GREY = np.full((H, W, 3), 120, np.uint8)


@pytest.mark.parametrize("size", [14, 20, 32, 48])
@pytest.mark.parametrize("outlined", [False, True])
@pytest.mark.parametrize(("ground", "precision"), [(GREY, 0.75), (noise(6.0), 0.4)], ids=["grey", "texture"])
def test_text_area_is_that_of_the_writing(ground: np.ndarray, precision: float, outlined: bool, size: int) -> None:
    frame, where = written_on(ground, size, size // 14 if outlined else 0)
    found = np.zeros((H, W), bool)
    for left, top, width, height in text_lines(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)):
        found[top : top + height, left : left + width] = True
    assert (found & where).sum() >= 0.9 * where.sum()
    assert (found & where).sum() >= precision * found.sum()
    assert measure_texture(frame[None])["text_area"] == pytest.approx(found.mean())


def test_text_area_of_a_larger_frame_is_the_same_share() -> None:
    frame, _ = written_on(GREY, 24)
    large = cv2.resize(frame, (3 * W, 3 * H), interpolation=cv2.INTER_CUBIC)
    small, big = (measure_texture(each[None])["text_area"] for each in (frame, large))
    assert big == pytest.approx(small, rel=0.2)


@pytest.mark.parametrize("blur", [0.0, 1.0, 2.0, 3.0, 6.0])
def test_no_text_is_seen_in_a_texture(blur: float) -> None:
    assert measure_texture(noise(blur)[None])["text_area"] == 0


def test_no_text_is_seen_in_a_photograph_without_any() -> None:
    from sklearn.datasets import load_sample_image

    for name in ("china.jpg", "flower.jpg"):
        assert measure_texture(load_sample_image(name)[None])["text_area"] == 0


def test_no_text_is_seen_in_clips_of_the_pack() -> None:
    clips = render(sample_scenes(np.random.default_rng(0), 40), list(range(40)))
    assert [measure_texture(clip)["text_area"] for clip in clips] == [0] * 40


def test_flatness_is_the_share_of_flat_tiles() -> None:
    frame = np.full((480, 960, 3), 100, np.uint8)
    frame[:240, :480] = noise(1.0, height=240, width=480)
    assert measure_texture(frame[None])["flatness"] == 6 / 8
    frame[:] = 100
    frame[:, 479:481] = 255  # in each of two tiles beside it, a row of magnitude 4 x 155 at 1 of 240: above 800
    assert measure_texture(frame[None])["flatness"] == 4 / 8


@pytest.mark.parametrize(("contrast", "flat"), [(100, 0.0), (4, 1.0)])
def test_flatness_of_a_small_frame_is_that_of_one_tile(contrast: int, flat: float) -> None:
    frame = np.full((64, 64, 3), 100, np.uint8)
    frame[:, 32:] += np.uint8(contrast)
    assert measure_texture(frame[None])["flatness"] == flat


@pytest.mark.parametrize(("levels", "bits"), [(1, 0.0), (2, 1.0), (16, 4.0), (256, 8.0)])
def test_entropy_is_the_logarithm_of_equally_frequent_levels(levels: int, bits: float) -> None:
    ramp = np.arange(256 * 4) % levels * (256 // levels)
    frame = np.repeat(ramp.reshape(32, 32, 1).astype(np.uint8), 3, axis=2)
    assert measure_texture(frame[None])["entropy"] == pytest.approx(bits, abs=1e-9)


def test_luminance_weighs_colours_by_bt709() -> None:
    for colour, luminance in (((255, 0, 0), 54.213), ((0, 255, 0), 182.376), ((0, 0, 255), 18.411)):
        frames = np.full((3, 8, 8, 3), colour, np.uint8)
        assert measure_texture(frames)["luminance"] == pytest.approx(luminance, abs=1e-3)


@pytest.mark.parametrize(
    ("shown", "duplicates", "frozen"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 0.0, 0.0),
        ([0, 0, 1, 1, 2, 2, 3, 3], 4 / 7, 2 / 8),
        ([0, 1, 2, 2, 2, 2, 2, 3], 4 / 7, 5 / 8),
        ([0, 0, 0, 0, 0, 0, 0, 0], 1.0, 1.0),
        ([0, 1, 0, 1, 0, 1, 0, 1], 0.0, 0.0),
    ],
)
def test_repeated_frames_are_counted(shown: list[int], duplicates: float, frozen: float, footage: Any) -> None:
    scores = measure_texture(footage.frames(8)[shown])
    assert (scores["duplicate_frames"], scores["frozen"]) == (pytest.approx(duplicates), pytest.approx(frozen))


@pytest.mark.parametrize("crf", ["18", "23"])
def test_a_clip_that_freezes_is_found_through_a_codec(crf: str, footage: Any) -> None:
    frames = footage.frames(48)
    frames[20:] = frames[20]
    made = footage.video("a.mp4", frames, options={"crf": crf}, gop=250)
    scores = measure_texture(read(made, 0, 2))
    assert scores["frozen"] == pytest.approx(28 / 48, abs=0.15)
    assert measure_texture(read(footage.video("b.mp4", footage.frames(48), options={"crf": crf}), 0, 2))["frozen"] == 0


def test_an_image_says_nothing_of_time() -> None:
    assert tuple(measure_texture(GREY[None])) == MEASURED[:4]
    assert tuple(measure_texture(np.stack([GREY, GREY]))) == MEASURED


def test_measure_refuses_what_are_no_frames() -> None:
    with pytest.raises(SampleError, match=r"expected uint8 \[T, H, W, 3\]") as caught:
        measure_texture(np.zeros((3, 8, 8, 3), np.float32))
    assert caught.value.error_type == "score_failed"


def test_the_stage_adds_to_scores_and_verdicts_and_leaves_its_input_alone(footage: Any) -> None:
    frozen = np.repeat(footage.frames(1), 8, axis=0)
    frames = np.stack([footage.frames(8), frozen, frozen])
    frames.setflags(write=False)
    batch = {
        "frames": frames,
        "scores": texts(['[{"name": "sharpness", "value": 9.0}]', "", ""]),
        "verdict": texts(["rejected", "accepted", "accepted"]),
        "reasons": texts(['["motion 0 < 1"]', "", ""]),
        "error_type": texts(["", "", ""]),
        "error": texts(["", "", ""]),
    }
    out = ScoreTexture(max_frozen=0.5, max_luminance=254.0)(batch)
    assert list(out["verdict"]) == ["rejected"] * 3
    assert load_json(out["reasons"]) == [["motion 0 < 1"], ["frozen 1 > 0.5"], ["frozen 1 > 0.5"]]
    assert [score["name"] for score in json.loads(out["scores"][0])] == ["sharpness", *MEASURED]
    assert list(ScoreTexture()(batch)["verdict"]) == ["rejected", "accepted", "accepted"]
    assert batch["reasons"][1] == "" and batch["verdict"][1] == "accepted"
