"""The small world: its rules, prompts that read back, and clips that show what the scene says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from models.pack import world
from models.pack.geometry import OUTLINES
from models.pack.grammar import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Figure,
    Scene,
    Shot,
    abridge,
    complete,
    every_figure,
    flaw,
    is_complete,
    is_held_out,
    keeps,
    sample_scenes,
)
from models.pack.phrases import VOCABULARY, describe, parse, words_outside
from models.pack.world import PALETTE, cut_frame, render


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def _scene(figure: Figure) -> Scene:
    return Scene((Shot((figure,)),))


def _one(background: str = "white", **said: str) -> Scene:
    return Scene((Shot((Figure(**said),), background),))


def test_describe_says_what_parse_reads():
    rng = _rng()
    scenes = sample_scenes(rng, 600) + sample_scenes(rng, 200, image=True)
    scenes += [abridge(scene, rng) for scene in scenes]
    prompts = [describe(scene, rng) for scene in scenes]
    assert [parse(prompt) for prompt in prompts] == scenes
    assert [parse(describe(scene)) for scene in scenes] == scenes
    assert not any(words_outside(prompt) for prompt in prompts)
    assert len(set(prompts)) > 0.9 * len(prompts)


def test_describe_uses_every_word_or_the_parser_passes_it_over():
    rng = _rng()
    scenes = sample_scenes(rng, 1500) + sample_scenes(rng, 300, image=True)
    said = {word for scene in scenes for word in describe(scene, rng).replace(",", " ,").replace(";", " ;").split()}
    assert said <= VOCABULARY
    assert VOCABULARY - said <= set("the one is that which plain solid first there shape figure".split())  # noqa: SIM905


def test_describe_without_a_generator_is_plain():
    scene = sample_scenes(_rng(), 1)[0]
    assert describe(_one(shape="star", colour="red", size="small", motion="up")) == (
        "a small red star moving up on a white background"
    )
    assert describe(scene) == describe(scene)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("A red circle.", _one(None, shape="circle", colour="red")),
        ("there is a big spinning SQUARE that is violet", None),
        ("a big spinning square", _one(None, shape="square", size="large", motion="spinning")),
        ("on a gray background, an orange hoop that grows", _one("grey", shape="ring", colour="orange", motion="growing")),
        ("a small star growing", _one(None, shape="star", motion="growing")),
        ("a large star growing", None),
        ("a red shape", _one(None, colour="red")),
        ("a red circle spinning", None),
        ("a red circle on a red background", None),
        ("a white circle on a white background", None),
        ("a red circle and a red star", None),
        ("a red circle, then a blue star moving up on a black background",
         Scene((Shot((Figure("circle", "red"),)), Shot((Figure("star", "blue", None, "up"),), "black")))),
        ("a circle on a black background, then a star on a black background", None),
        ("a circle and a star and a ring", None),
        ("a circle and a star, then a ring", None),
        ("a red red circle", None),
        ("a red circle moving left and", None),
        ("a cat on a white background", None),
        ("", None),
    ],
)  # fmt: skip
def test_parse_knows_the_grammar_and_nothing_else(prompt: str, said: Scene | None):
    assert parse(prompt) == said


def test_words_outside_are_named_once_and_in_order():
    assert words_outside("A fluffy red circle chasing a fluffy Cat, then a star") == ["fluffy", "chasing", "cat"]


def test_sample_scenes_are_complete_and_of_the_world():
    scenes = sample_scenes(_rng(), 900)
    assert all(flaw(scene) is None and is_complete(scene) for scene in scenes)
    assert [sum(scene.kind == kind for scene in scenes) for kind in ("one", "two", "cut")] == [300, 300, 300]
    images = sample_scenes(_rng(), 100, image=True)
    assert all(flaw(scene) is None and is_complete(scene, image=True) for scene in images)
    assert sample_scenes(_rng(5), 50) == sample_scenes(_rng(5), 50)


def test_sample_scenes_draws_each_value_about_as_often():
    figures = [scene.figures[0] for scene in sample_scenes(_rng(), 2700, kinds=("one",))]
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS)):
        for value in values:
            share = sum(getattr(figure, name) == value for figure in figures) / len(figures)
            assert share == pytest.approx(1 / len(values), rel=0.3), (name, value, share)


def test_held_out_trios_leave_every_pair_of_values_to_training():
    figures = every_figure()
    held = [is_held_out(_scene(figure)) for figure in figures]
    assert 0.05 < np.mean(held) < 0.15
    for first, second in (("shape", "colour"), ("shape", "motion"), ("colour", "motion")):
        pairs = {(getattr(figure, first), getattr(figure, second)) for figure in figures}
        trained = [figure for figure, out in zip(figures, held, strict=True) if not out]
        assert {(getattr(figure, first), getattr(figure, second)) for figure in trained} == pairs
    for name in ("shape", "colour", "motion"):
        out = {getattr(figure, name) for figure, held_out in zip(figures, held, strict=True) if held_out}
        assert out == {getattr(figure, name) for figure in figures}


def test_held_out_never_changes():
    held = {(figure.shape, figure.colour, figure.motion) for figure in every_figure() if is_held_out(_scene(figure))}
    assert len(held) == 49
    assert hashlib.sha256(repr(sorted(held)).encode()).hexdigest()[:16] == "d47a9bd684d77b1a"


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_sample_scenes_keeps_to_its_split(split: str):
    scenes = sample_scenes(_rng(), 60, split=split)
    assert {is_held_out(scene) for scene in scenes} == {split == "held_out"}


def test_complete_keeps_what_was_said():
    rng = _rng()
    for scene in sample_scenes(rng, 300):
        short = abridge(scene, rng)
        whole = complete(short, rng)
        assert flaw(whole) is None and is_complete(whole) and keeps(whole, short)
    with pytest.raises(ValueError, match="spin"):
        complete(_one(shape="circle", motion="spinning"), rng)


def test_keeps_takes_figures_in_any_order_and_no_more():
    circle, star = Figure("circle", "red", "small", "still"), Figure("star", "blue", "large", "up")
    both = Scene((Shot((circle, star), "white"),))
    assert keeps(both, Scene((Shot((Figure("star"), Figure("circle", "red"))),)))
    assert not keeps(both, Scene((Shot((Figure("star", "red"), Figure("circle"))),)))
    assert not keeps(both, Scene((Shot((Figure("star"),)),)))


def test_render_gives_clips_of_the_right_shape_and_the_same_bytes_whatever_is_beside():
    scenes = sample_scenes(_rng(), 90)
    clips = render(scenes, range(90))
    assert clips.shape == (90, 17, 64, 64, 3) and clips.dtype == np.uint8
    assert np.array_equal(render(scenes[40:43], range(40, 43)), clips[40:43])
    assert not np.array_equal(render(scenes[:1], [1])[0], clips[0])


def test_render_makes_images():
    scenes = sample_scenes(_rng(), 20, image=True)
    assert render(scenes, range(20), num_frames=1).shape == (20, 1, 64, 64, 3)


def test_render_refuses_what_nobody_could_see():
    with pytest.raises(ValueError, match="nobody can see a ring spin"):
        render([_one(shape="ring", colour="red", size="small", motion="spinning")], [0])
    with pytest.raises(ValueError, match="not said"):
        render([_one(shape="ring", colour="red", motion="up")], [0])
    with pytest.raises(ValueError, match="one seed a scene"):
        render(sample_scenes(_rng(), 2), [0])


def test_render_shows_background_to_the_edge_and_cuts_where_a_latent_frame_begins():
    scenes = sample_scenes(_rng(), 60, kinds=("cut",))
    clips = render(scenes, range(60)).astype(int)
    assert cut_frame(17) == 9
    for scene, clip in zip(scenes, clips, strict=True):
        for shot, frames in zip(scene.shots, (clip[:9], clip[9:]), strict=True):
            edge = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
            away = np.abs(edge - PALETTE[shot.background]).max(axis=2)
            assert np.quantile(away, 0.98) <= np.ceil(world.SHADE)
            assert away.max() < 60, "the tip of a triangle or a star may touch the last pixel, no more"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_size_have_one_area(shape: str):
    scenes = [_one(shape=shape, colour="black", size="large", motion="still")] * 16
    frame = render(scenes, range(16))[:, 0].astype(float)
    background = frame[:, :1, :1]
    covered = ((frame - background) / (np.min(frame, axis=(1, 2), keepdims=True) - background)).mean(axis=3)
    radius = np.sqrt(covered.sum(axis=(1, 2)) / np.pi)
    assert radius == pytest.approx(np.full(16, world.RADII["large"]), rel=world.RADIUS_SPREAD + 0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_turn_into_themselves_and_reach_as_far_as_they_say(shape: str):
    outline = OUTLINES[shape]
    grid = (np.arange(201) - 100) / 50
    x, y = np.meshgrid(grid, grid)
    inside = outline.distance(x, y, np.ones(())) <= 0
    assert np.hypot(x, y)[inside].max() == pytest.approx(outline.reach, abs=0.04)
    if outline.fold:
        angle = 2 * np.pi / outline.fold
        turned = outline.distance(
            np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x, np.ones(())
        )
        assert turned == pytest.approx(outline.distance(x, y, np.ones(())), abs=1e-9)


def test_every_pair_of_large_figures_finds_room_and_never_touches():
    large = [figure for figure in every_figure() if figure.size == "large" and figure.colour == "red"]
    hard = [figure for figure in large if figure.shape in ("star", "triangle")]
    scenes = [
        Scene((Shot((first, Figure(second.shape, "blue", second.size, second.motion)), "white"),))
        for first in hard
        for second in hard
    ]
    clips = render(scenes, range(len(scenes))).astype(int)
    red, blue = np.abs(clips - PALETTE["red"]).max(axis=4) < 40, np.abs(clips - PALETTE["blue"]).max(axis=4) < 40
    beside = np.zeros_like(blue)
    beside[:, :, 1:] |= blue[:, :, :-1]
    beside[:, :, :, 1:] |= blue[:, :, :, :-1]
    assert not (red & beside).any()
    assert red.any(axis=(2, 3)).all() and blue.any(axis=(2, 3)).all()


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_steady(motion: str):
    shape = "square"
    size = None if motion in ("growing", "shrinking") else "medium"
    clips = render([_one("black", shape=shape, colour="white", size=size, motion=motion)] * 12, range(12))
    light = clips.astype(float).mean(axis=4)
    light -= light[:, :, :1, :1]
    total = light.sum(axis=(2, 3))
    x = (light.sum(axis=2) @ np.arange(64)) / total
    y = (light.sum(axis=3) @ np.arange(64)) / total
    dx, dy = np.diff(x, axis=1), np.diff(y, axis=1)
    if motion in world.STEP:
        along = dx * world.STEP[motion][0] + dy * world.STEP[motion][1]
        assert along.min() > 0.6 and along.std(axis=1).max() < 0.1
    elif motion == "bouncing":
        assert np.abs(dx).max() < 0.1 and np.ptp(y, axis=1).min() > 6
    else:
        assert np.abs(dx).max() < 0.15 and np.abs(dy).max() < 0.15
    ratio = total[:, -1] / total[:, 0]
    grown = (world.RADII["large"] / world.RADII["small"]) ** 2
    expected = {"growing": grown, "shrinking": 1 / grown}.get(motion, 1.0)
    assert ratio == pytest.approx(np.full(12, expected), rel=0.05)
    changes = np.abs(np.diff(light, axis=1)).mean(axis=(2, 3)).min(axis=1)
    assert (changes == 0).all() if motion == "still" else (changes > 0).all()


def test_backgrounds_and_colours_have_a_place_in_the_palette():
    assert set(PALETTE) == {*COLOURS, *BACKGROUNDS}
    values = np.asarray(list(PALETTE.values()), dtype=float)
    distance = np.linalg.norm(values[:, None] - values, axis=2) + 1e9 * np.eye(len(values))
    assert distance.min() > 80
