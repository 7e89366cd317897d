from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from pipelines.spec import Score
from stages.batch import Batch, SampleError, load_json, texts
from stages.score import ScoreMedia, measure, perceptual_hash


def texture(height: int, width: int, blur: float = 3.0, seed: int = 0) -> np.ndarray:
    """Smooth grey noise [height, width, 3] that fills 0-255."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((height, width)), (0, 0), blur)
    noise = (noise - noise.min()) / (noise.max() - noise.min()) * 255
    return np.repeat(noise.astype(np.uint8)[..., None], 3, axis=2)


def grey(levels: list[int], side: int = 64) -> np.ndarray:
    """A video whose frame t is evenly of grey level levels[t]."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def pan(dx: int, dy: int, height: int = 64, width: int = 64, num_frames: int = 6, blur: float = 3.0) -> np.ndarray:
    """A view that moves over a texture by (dx, dy) pixels a frame."""
    plane = texture(height + dy * num_frames, width + dx * num_frames, blur)
    return np.stack([plane[dy * t : dy * t + height, dx * t : dx * t + width] for t in range(num_frames)])


def square(side: int, dx: int, frame: int = 128, num_frames: int = 6) -> np.ndarray:
    """A textured square that moves over flat grey by dx pixels a frame."""
    patch = texture(side, side, 2.0)
    frames = np.full((num_frames, frame, frame, 3), 120, np.uint8)
    for t in range(num_frames):
        frames[t, 32 : 32 + side, 10 + dx * t : 10 + dx * t + side] = patch
    return frames


def batch_of(*clips: np.ndarray, **columns: list[str]) -> Batch:
    frames = np.stack(clips)
    frames.setflags(write=False)  # as they come out of a block
    empty = texts([""] * len(clips))
    given = {name: texts(values) for name, values in columns.items()}
    ids = texts([f"s{at}" for at in range(len(clips))])
    return {"sample_id": ids, "frames": frames, "error_type": empty, "error": empty, "extra": empty, **given}


def values_of(out: Batch, row: int) -> dict[str, float]:
    return {score["name"]: score["value"] for score in load_json(out["scores"])[row]}


@pytest.mark.parametrize(
    ("levels", "flicker"),
    [
        ([100] * 6, 0.0),
        ([10, 20, 30, 40, 50, 60], 0.0),  # a steady fade is no flicker
        ([100, 120] * 3, 40.0),  # alternating by d: each second difference is 2d
        ([100, 100, 130, 100, 100], 40.0),  # one flash: 30, 60, 30
        ([100, 200], 0.0),  # two frames have no second difference
    ],
)
def test_measure_flicker_is_the_mean_second_difference(levels, flicker):
    scores = measure(grey(levels))
    assert scores["flicker"] == pytest.approx(flicker, abs=1e-9)
    assert scores["brightness"] == pytest.approx(np.mean(levels), abs=1e-9)


def test_measure_brightness_weighs_colours_as_the_eye_does():
    for colour, luma in (((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29)):
        assert measure(np.full((1, 16, 16, 3), colour, np.uint8))["brightness"] == luma


def test_measure_sharpness_of_a_checkerboard_is_exact():
    # Each pixel differs from its four neighbours by 2a: the Laplacian is +-8a, its variance (8a)^2.
    board = np.indices((32, 32)).sum(axis=0) % 2
    frame = (100 + 10 * (2 * board - 1)).astype(np.uint8)
    assert measure(np.repeat(frame[None, ..., None], 3, axis=3))["sharpness"] == pytest.approx(80.0**2)


def test_measure_sharpness_falls_with_blur():
    sharp = texture(64, 64, 1.0)
    blurred = cv2.GaussianBlur(sharp, (0, 0), 3)
    assert measure(blurred[None])["sharpness"] < 0.05 * measure(sharp[None])["sharpness"]


@pytest.mark.parametrize(
    ("dx", "dy", "height", "width", "blur"),
    [(1, 0, 64, 64, 3.0), (2, 0, 64, 64, 3.0), (3, 4, 128, 128, 4.0), (8, 0, 128, 512, 8.0), (6, 8, 240, 416, 8.0)],
)
def test_measure_motion_of_a_pan_is_its_speed_at_any_size(dx, dy, height, width, blur):
    assert measure(pan(dx, dy, height, width, blur=blur))["motion"] == pytest.approx(np.hypot(dx, dy), rel=0.05)


@pytest.mark.parametrize("side", [32, 48, 64])
@pytest.mark.parametrize("dx", [1, 2, 4])
def test_measure_motion_of_a_shape_is_its_speed_times_its_area(side, dx):
    # Flow reaches beyond the shape by up to the 15 pixels of Farneback's window on each side.
    motion = measure(square(side, dx))["motion"]
    assert dx * (side / 128) ** 2 < motion < dx * ((side + 30) / 128) ** 2


@pytest.mark.parametrize(
    ("change", "static"),
    [((0, 0), 1.0), ((1, 2), 1.0), ((1, 3), 0.0), ((1, 100), 0.0)],
)
def test_measure_static_forgives_rounding_and_nothing_else(change, static):
    pixels, levels = change
    frames = np.repeat(texture(64, 64)[None] // 2, 5, axis=0)
    frames[3, :pixels, :pixels] += np.uint8(levels)
    assert measure(frames)["static"] == static


def test_measure_of_an_image_says_nothing_of_time():
    assert set(measure(texture(32, 32)[None])) == {"sharpness", "brightness"}


def test_measure_repeats_its_bits_wherever_frames_lie_in_memory():
    frames = pan(3, 2)
    found = set()
    for shift in range(1, 40):
        memory = np.zeros(frames.size + shift, np.uint8)
        memory[shift:] = frames.ravel()
        found.add(json.dumps(measure(memory[shift:].reshape(frames.shape))))
    assert len(found) == 1


@pytest.mark.parametrize(
    "frames",
    [np.full((3, 8, 8, 3), np.nan, np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)],
)
def test_measure_refuses_what_are_no_frames(frames):
    with pytest.raises(SampleError, match=r"expected uint8 \[T, H, W, 3\], found") as caught:
        measure(frames)
    assert caught.value.error_type == "score_failed"


def test_score_marks_frames_it_cannot_score_as_failed():
    batch = batch_of(np.full((3, 8, 8, 3), np.nan, np.float32))
    out = ScoreMedia()(batch)
    assert (out["error_type"][0], out["verdict"][0]) == ("score_failed", "")
    assert "float32" in out["error"][0]


@pytest.mark.parametrize(
    ("settings", "clip", "reason"),
    [
        ({"min_motion": 0.25}, grey([100, 103] * 3), "motion 0 < 0.25"),
        ({"max_motion": 3.0}, pan(3, 4), "motion "),
        ({"max_flicker": 10.0}, grey([100, 120] * 3), "flicker 40 > 10"),
        ({"min_brightness": 16.0}, grey([4, 8] * 3), "brightness 6 < 16"),
        ({"max_brightness": 240.0}, grey([251, 255] * 3), "brightness 253 > 240"),
        ({"min_sharpness": 1.0}, grey([100, 110] * 3), "sharpness 0 < 1"),
        ({}, grey([100] * 6), "static: no frame differs from the first"),
    ],
)
def test_score_rejects_planted_trouble_and_says_why(settings, clip, reason):
    good = pan(1, 1)
    out = ScoreMedia(**settings)(batch_of(clip, good))
    assert list(out["verdict"]) == ["rejected", "accepted"]
    reasons = load_json(out["reasons"])
    assert len(reasons[0]) == 1 and reasons[0][0].startswith(reason) and reasons[1] == []
    assert list(ScoreMedia(reject_static=False)(batch_of(clip, good))["verdict"]) == ["accepted", "accepted"]


def test_score_names_every_bound_that_was_missed():
    stage = ScoreMedia(min_brightness=16.0, min_motion=0.25)
    out = stage(batch_of(grey([6] * 4)))
    assert load_json(out["reasons"])[0] == [
        "brightness 6 < 16",
        "motion 0 < 0.25",
        "static: no frame differs from the first",
    ]


def test_score_keeps_the_first_of_duplicates():
    one, other = pan(2, 0), pan(0, 3, blur=5.0)
    noisy = np.clip(one.astype(int) + np.random.default_rng(0).integers(-2, 3, one.shape), 0, 255).astype(np.uint8)
    out = ScoreMedia(duplicate_distance=6)(batch_of(one, other, noisy, one))
    assert list(out["verdict"]) == ["accepted", "accepted", "rejected", "rejected"]
    assert load_json(out["reasons"])[3] == ["duplicate of s0: perceptual hashes differ in 0 of 64 bits"]
    out = ScoreMedia(reject_duplicates=False)(batch_of(one, one))
    assert list(out["verdict"]) == ["accepted", "accepted"]


def test_score_tells_duplicates_from_what_only_hashes_alike():
    red, blue, other_way = np.full((3, 6, 64, 64, 3), 30, np.uint8)
    for t in range(6):
        # Luma 76 both, and one middle frame: by its hash alone all three are one.
        red[t, 20:32, 4 * t : 4 * t + 12] = (255, 0, 0)
        blue[t, 20:32, 4 * t : 4 * t + 12] = (70, 70, 125)
        other_way[t, 20:32, 24 - 4 * t : 36 - 4 * t] = (255, 0, 0)
    other_way[3] = red[3]
    assert len({perceptual_hash(clip) for clip in (red, blue, other_way)}) == 1
    assert list(ScoreMedia()(batch_of(red, blue, other_way))["verdict"]) == ["accepted"] * 3


def test_score_does_not_reject_for_the_sake_of_a_rejected_twin():
    frozen = np.repeat(pan(2, 0)[3:4], 6, axis=0)  # the same middle frame, but static
    assert list(ScoreMedia()(batch_of(frozen, pan(2, 0)))["verdict"]) == ["rejected", "accepted"]


def test_perceptual_hash_tells_likeness():
    one, other = texture(64, 64)[None], texture(64, 64, seed=1)[None]
    brighter = (one // 2 + 60).astype(np.uint8)
    assert (perceptual_hash(one) ^ perceptual_hash(brighter)).bit_count() <= 6
    assert (perceptual_hash(one) ^ perceptual_hash(other)).bit_count() >= 16


def test_score_adds_to_what_is_there_and_leaves_its_input_alone():
    batch = batch_of(pan(1, 0), extra=['{"variant": 1}'], scores=['[{"name": "given", "value": 1.0}]'])
    out = ScoreMedia()(batch)
    assert list(values_of(out, 0)) == ["given", "sharpness", "brightness", "motion", "flicker", "static"]
    extra = json.loads(out["extra"][0])
    assert extra["variant"] == 1 and int(extra["phash"], 16) == perceptual_hash(batch["frames"][0])
    assert len(extra["phash"]) == 16 and batch["extra"][0] == '{"variant": 1}'


def test_score_takes_the_settings_of_the_spec():
    assert ScoreMedia(**Score().model_dump()) == ScoreMedia()
