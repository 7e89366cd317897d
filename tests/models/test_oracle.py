"""The oracle reads what a clip shows, also through blur, noise and codecs, and says so when there is nothing to read."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from infra.media import decode, encode
from models.pack.grammar import Figure, Scene, Shot, sample_scenes
from models.pack.oracle import Reading, match, read
from models.pack.world import PALETTE, render


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def _one(shape: str, motion: str, size: str | None = "medium", colour: str = "red", background: str = "white") -> Scene:
    return Scene((Shot((Figure(shape, colour, size, motion),), background),))


def _right(scenes: list[Scene], clips: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> float:
    return float(np.mean([all(match(read(change(c)), s).values()) for s, c in zip(scenes, clips, strict=True)]))


def _blur(clip: np.ndarray) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in clip])


def _noise(clip: np.ndarray) -> np.ndarray:
    return np.clip(clip + _rng(9).normal(0, 6, clip.shape), 0, 255).astype(np.uint8)


def _codec(clip: np.ndarray) -> np.ndarray:
    media = encode(clip, 8, crf=23)
    return decode(media.data, media.suffix)


def _large(clip: np.ndarray) -> np.ndarray:
    return np.stack([cv2.resize(frame, (128, 128), interpolation=cv2.INTER_CUBIC) for frame in clip])


CHANGES = {"rendered": lambda clip: clip, "blurred": _blur, "noisy": _noise, "encoded": _codec, "at 128x128": _large}


@pytest.mark.parametrize("change", CHANGES)
def test_read_gives_back_the_scene(change: str):
    scenes = sample_scenes(_rng(1), 60)
    assert _right(scenes, render(scenes, range(60)), CHANGES[change]) >= 0.98


def test_read_gives_back_exactly_the_figures():
    scenes = sample_scenes(_rng(2), 60)
    for scene, clip in zip(scenes, render(scenes, range(60)), strict=True):
        seen = read(clip).scene
        assert seen is not None
        assert [set(shot.figures) for shot in seen.shots] == [set(shot.figures) for shot in scene.shots]
        assert [shot.background for shot in seen.shots] == [shot.background for shot in scene.shots]


def test_read_gives_back_images():
    scenes = sample_scenes(_rng(3), 60, image=True)
    clips = render(scenes, range(60), num_frames=1)
    readings = [read(clip) for clip in clips]
    assert all(all(match(reading, scene).values()) for reading, scene in zip(readings, scenes, strict=True))
    assert all("motion" not in match(reading, scene) for reading, scene in zip(readings, scenes, strict=True))


def test_read_refuses_noise():
    for cells in (4, 16, 64):
        noise = _rng(cells).uniform(0, 255, (6, 17, cells, cells, 3)).astype(np.uint8)
        clips = [np.stack([cv2.resize(frame, (64, 64)) for frame in clip]) for clip in noise]
        assert all(read(clip).scene is None for clip in clips)


@pytest.mark.parametrize("colour", PALETTE)
def test_read_refuses_blank_frames(colour: str):
    clip = np.broadcast_to(np.uint8(PALETTE[colour]), (17, 64, 64, 3))
    for each in (clip, _noise(clip)):
        reading = read(each)
        assert reading.scene is None and reading.reason


def test_read_refuses_blends_of_two_clips():
    clips = render(sample_scenes(_rng(4), 90), range(90)).astype(np.float32)
    share = np.linspace(0.3, 0.7, 90)[:, None, None, None, None]
    mixed = (share * clips + (1 - share) * np.roll(clips, -1, axis=0)).astype(np.uint8)
    assert sum(read(clip).scene is not None for clip in mixed) <= 1


def test_read_refuses_a_figure_that_flickers():
    clip = render([_one("square", "still")], [0])[0].copy()
    clip[3::4] = clip[0, 0, 0]
    assert read(clip).reason == "the red figure comes and goes"


def test_read_refuses_a_third_figure():
    clip = render([_one("square", "still", "small")], [0])[0].copy()
    clip[:, 50:60, 2:12] = PALETTE["blue"]
    assert {figure.colour for figure in read(clip).scene.figures} == {"red", "blue"}
    clip[:, 50:60, 50:60] = PALETTE["green"]
    assert read(clip).scene is None


def test_read_refuses_a_background_that_changes_and_changes():
    first, second = render([_one("star", "still"), _one("star", "still", background="black")], [0, 1])
    assert read(np.concatenate([first[:5], second[:5], first[:5]])).reason == "the background flickers"


@pytest.mark.parametrize(
    "draw",
    [
        lambda image: cv2.ellipse(image, (256, 256), (95, 60), 0, 0, 360, PALETTE["red"], -1),
        lambda image: cv2.rectangle(image, (176, 206), (336, 306), PALETTE["red"], -1),
        lambda image: cv2.ellipse(image, (256, 256), (80, 80), 0, 0, 180, PALETTE["red"], -1),
        lambda image: cv2.fillPoly(image, [np.array([[190, 190], [190, 320], [320, 320]])], PALETTE["red"]),
    ],
    ids=["ellipse", "rectangle", "half disc", "right triangle"],
)
def test_read_sees_that_a_shape_is_none_of_the_world(draw: Callable[[np.ndarray], object]):
    large = np.full((512, 512, 3), 245, dtype=np.uint8)
    draw(large)
    clip = np.repeat(cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)[None], 17, axis=0)
    assert read(clip).scene == Scene(
        (Shot((Figure(None, "red", read(clip).scene.figures[0].size, "still"),), "white"),)
    )


def test_read_sees_what_is_wrong_with_a_motion():
    clip = render([_one("square", "right")], [0])[0]
    assert read(clip).scene.figures[0].motion == "right"
    assert read(clip[::-1]).scene.figures[0].motion == "left"
    assert read(np.repeat(clip[:1], 17, axis=0)).scene.figures[0].motion == "still"
    assert read(clip[_rng().permutation(17)]).scene.figures[0].motion is None
    jerky = np.concatenate([clip[:5], np.repeat(clip[4:5], 6, axis=0), clip[11:]])
    assert read(jerky).scene.figures[0].motion is None


def test_read_sees_no_single_motion_in_two_at_once():
    clip = render([_one("square", "growing", None)], [0])[0]
    moving = np.stack([np.roll(frame, (at, at // 2), axis=(0, 1)) for at, frame in enumerate(clip)])
    moving = np.stack([np.roll(frame, (-8, 0), axis=(0, 1)) for frame in moving])
    assert read(moving).scene is None or read(moving).scene.figures[0].motion is None


def test_read_says_what_it_expects():
    with pytest.raises(ValueError, match=r"expected uint8 frames \[T, H, W, 3\]"):
        read(np.zeros((17, 64, 64), dtype=np.float32))


def test_match_tells_attributes_apart():
    seen = Reading(_one("square", "right"))
    assert match(seen, _one("square", "right")) == dict.fromkeys(
        ("count", "shape", "colour", "size", "motion", "background"), True
    )
    wrong = match(seen, _one("star", "left", "small", "blue", "black"))
    assert wrong == {"count": True} | dict.fromkeys(("shape", "colour", "size", "motion", "background"), False)
    assert match(seen, _one("square", "still"))["motion"] is False


def test_match_asks_only_for_what_was_said():
    said = Scene((Shot((Figure("square"),)),))
    assert match(Reading(_one("square", "right")), said) == {"count": True, "shape": True}
    assert match(Reading(None, "noise"), said) == {"count": False, "shape": False}


def test_match_pairs_figures_whatever_their_order():
    circle, star = Figure("circle", "red", "small", "still"), Figure("star", "blue", "large", "up")
    both, turned = Scene((Shot((circle, star), "white"),)), Scene((Shot((star, circle), "white"),))
    assert all(match(Reading(both), turned).values())
    swapped = Scene(
        (Shot((Figure("circle", "blue", "small", "still"), Figure("star", "red", "large", "up")), "white"),)
    )
    assert match(Reading(swapped), both)["colour"] is False
    assert match(Reading(swapped), both)["shape"] is True
    missing = match(Reading(Scene((Shot((circle,), "white"),))), both)
    assert missing["count"] is False and missing["shape"] is False and missing["background"] is True
