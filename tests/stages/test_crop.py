from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from models.pack.grammar import Figure, Scene, Shot
from models.pack.world import render
from stages.clip import Wanted, glance, read
from stages.crop import Box, picture

H, W = 180, 320


def boxed(frames: np.ndarray, top: int, bottom: int, left: int, right: int, colour: Any = 0) -> np.ndarray:
    """The frames with bars laid over their edges."""
    made = np.empty_like(frames)
    made[:] = colour
    inside = (slice(None), slice(top, frames.shape[1] - bottom), slice(left, frames.shape[2] - right))
    made[inside] = frames[inside]
    return made


BARS = {
    "none": (0, 0, 0, 0),
    "letterbox": (24, 24, 0, 0),
    "pillars of an upright video": (0, 0, 110, 110),
    "window": (20, 20, 32, 32),
    "one side": (0, 36, 0, 0),
    "uneven border": (8, 4, 6, 10),
}


@pytest.mark.parametrize("colour", [0, 255, (40, 90, 160)])
@pytest.mark.parametrize("kind", BARS)
def test_bars_are_found_to_the_pixel(kind: str, colour: Any, footage: Any) -> None:
    top, bottom, left, right = BARS[kind]
    frames = boxed(footage.frames(8, H, W), top, bottom, left, right, colour)
    assert picture(frames) == Box(top, left, H - top - bottom, W - left - right)


@pytest.mark.parametrize("kind", BARS)
def test_bars_are_found_through_a_codec(kind: str, footage: Any) -> None:
    top, bottom, left, right = BARS[kind]
    made = footage.video("a.mp4", boxed(footage.frames(24, H, W), top, bottom, left, right), options={"crf": "23"})
    box = picture(glance(made, 0.0, 1.0))
    for found, planted in (
        (box.top, top),
        (box.left, left),
        (H - box.top - box.height, bottom),
        (W - box.left - box.width, right),
    ):
        assert planted - 2 <= found <= planted + 6
    assert read(made, 0.0, 1.0, Wanted(box=box)).shape[1:3] == (box.height, box.width)


def test_soft_edges_of_bars_are_cropped_with_them(footage: Any) -> None:
    frames = boxed(footage.frames(8, H, W), 24, 24, 0, 0)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in frames])
    box = picture(soft)
    assert 23 <= box.top <= 28 and 23 <= H - box.top - box.height <= 28 and (box.left, box.width) == (0, W)


def spot(level: int, ground: int, frames: int = 8) -> np.ndarray:
    """A disc that wanders over a plain ground: a moon, a torch, a ball."""
    made = np.full((frames, H, W, 3), ground, np.uint8)
    for at in range(frames):
        cv2.circle(made[at], (120 + 8 * at, 80), 15, (level,) * 3, -1)
    return made


WHOLE = {
    "black": lambda: np.zeros((8, H, W, 3), np.uint8),
    "a moon at night": lambda: spot(230, 0),
    "a ball before white": lambda: spot(60, 255),
    "noise in the dark": lambda: np.random.default_rng(0).integers(0, 8, (8, H, W, 3), dtype=np.uint8),
    "a dark room with a lamp": lambda: np.maximum(
        spot(200, 0), (np.indices((H, W))[1] / 40).astype(np.uint8)[None, ..., None]
    ),
    "a plain sky over a far town": lambda: sky(),
    "credits": lambda: text_on_black(),
    "a strip too narrow to be a picture": lambda: boxed(
        np.random.default_rng(0).integers(0, 256, (8, H, W, 3), dtype=np.uint8), 75, 75, 0, 0
    ),
}


def sky() -> np.ndarray:
    made = np.full((8, H, W, 3), (120, 170, 240), np.uint8)
    for at, tall in enumerate(np.random.default_rng(0).integers(5, 60, 40)):
        made[:, H - tall :, 8 * at : 8 * at + 8] = np.random.default_rng(at).integers(0, 90, 3)
    return made


def text_on_black() -> np.ndarray:
    made = np.zeros((8, H, W, 3), np.uint8)
    for at in range(8):
        cv2.putText(made[at], "directed by", (80, 100), cv2.FONT_HERSHEY_SIMPLEX, 1, (255, 255, 255), 2)
    return made


@pytest.mark.parametrize("kind", WHOLE)
def test_what_has_no_bars_is_left_whole(kind: str) -> None:
    assert picture(WHOLE[kind]()) == Box(0, 0, H, W)


@pytest.mark.parametrize("background", ["white", "grey", "black"])
def test_a_clip_of_the_pack_is_left_whole(background: str) -> None:
    scene = Scene((Shot((Figure("circle", "red", "large", "right"),), background),))
    assert picture(render([scene], [0])[0]) == Box(0, 0, 64, 64)


def test_a_subtitle_in_a_bar_keeps_the_bar(footage: Any) -> None:
    frames = boxed(footage.frames(8, H, W), 24, 24, 0, 0)
    for frame in frames:
        cv2.putText(frame, "a subtitle", (90, H - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1)
    box = picture(frames)
    assert (box.top, box.height) == (24, H - 24)


def test_a_picture_is_even_unless_asked(footage: Any) -> None:
    frames = boxed(footage.frames(8, H, W), 25, 24, 0, 7)
    assert picture(frames) == Box(25, 0, 130, 312)
    assert picture(frames, even=False) == Box(25, 0, 131, 313)


def test_a_box_is_carried_to_another_size_from_within() -> None:
    box = Box(13, 7, 101, 55).scaled((180, 320), (1080, 1920))
    assert box == Box(78, 42, 606, 330)
    small = Box(78, 43, 605, 330).scaled((1080, 1920), (180, 320))
    assert small == Box(13, 8, 100, 54)
