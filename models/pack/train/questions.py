"""What the judge is asked in training, and its answers: the rubric's questions, questions of attributes, captions.

Every answer follows from what the oracle reads off the clip (or, of a clip as rendered, from its scene, which the oracle
reads rightly in 995 cases of 1000) and from what the grammar says a prompt means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.pack.grammar import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Shot,
    abridge,
    flaw,
    is_complete,
    sample_scenes,
)
from models.pack.marks import is_clean, is_smooth
from models.pack.oracle import Reading, match, read
from models.pack.phrases import MOTIONS as MOTION_PHRASES
from models.pack.phrases import describe

HEAD = 'Does this {media} show what this description says? Description: "'
"""The questions of the default rubric and the captioner's instructions, word for word; a test holds them to it."""
TAIL = '" Answer Yes or No.'
NO_ARTEFACTS = "Is this {media} clean, free of noise, blur, distorted shapes and other artefacts? Answer Yes or No."
MOTION_SMOOTH = "Is the motion in this video smooth and natural, without jumps or flicker? Answer Yes or No."
SHORT = "Describe this {media} in one sentence."
DENSE = (
    "Describe this {media} in full detail: every object, its colours, shape, size and position, how it moves, "
    "the background, the light and the camera."
)
OTHER_HEADS = ("Does the {media} match: ", "Does this {media} show ", "Is this ")
OTHER_CLEAN = ("Is this {media} clean?", "Is the {media} free of artefacts?")
OTHER_SMOOTH = ("Is the motion smooth?", "Is the motion smooth and natural?")
MEDIA = ("video", "image")

DESCRIBED = 4
"""Descriptions asked about, of each clip."""
TRUE, NEAR = 0.45, 0.43
"""Share of descriptions of what is there, and of ones changed in one place; the rest describe something else."""
SHORTENED = 0.3
"""Share of descriptions that leave something unsaid."""
ATTRIBUTES = ("count", "shape", "colour", "size", "motion", "background")
"""What a description is right or wrong about: the names of `oracle.match`."""


@dataclass(frozen=True)
class Seen:
    """What is known of a clip: the oracle's reading, whether it is clean and smooth by it, and what was rendered."""

    reading: Reading
    clean: bool
    smooth: bool
    scene: Scene


@dataclass(frozen=True)
class Asked:
    """A text under its head (shared by some), and the answer. `right` is what the answer is made of, None if not said."""

    head: str
    text: str
    answer: str
    right: tuple[bool | None, ...] = (None,) * len(ATTRIBUTES)


def seen_as(frames: np.ndarray, scene: Scene) -> Seen:
    """By the oracle; `frames` is uint8 [T, 64, 64, 3]."""
    reading = read(frames)
    return Seen(reading, is_clean(frames, reading), is_smooth(frames, reading), scene)


def as_rendered(scene: Scene) -> Seen:
    return Seen(Reading(scene), True, True, scene)


def yes_no(answer: bool) -> str:
    return "Yes" if answer else "No"


def ask(seen: Seen, rng: np.random.Generator, *, image: bool = False) -> list[Asked]:
    """What one clip is asked in one step."""
    media = MEDIA[image]
    asked = []
    plain = rng.random() < 0.8
    head = (HEAD if plain else OTHER_HEADS[int(rng.integers(len(OTHER_HEADS)))]).format(media=media)
    for _ in range(DESCRIBED):
        asked.append(about(seen.reading, described(seen.scene, rng, image), rng, head, TAIL if plain else "?"))
    asked.append(Asked("", _either(NO_ARTEFACTS, OTHER_CLEAN, rng).format(media=media), yes_no(seen.clean)))
    if not image:
        asked.append(Asked("", _either(MOTION_SMOOTH, OTHER_SMOOTH, rng), yes_no(seen.smooth)))
    if (scene := seen.reading.scene) is not None and is_complete(scene, image=image):
        instruction = SHORT if rng.random() < 0.7 else DENSE
        asked.append(Asked("", instruction.format(media=media), caption(scene, dense=instruction is DENSE)))
        asked.append(attribute(scene, rng, image))
    return asked


def about(reading: Reading, scene: Scene, rng: np.random.Generator | None, head: str, tail: str) -> Asked:
    """Whether a clip that reads so shows `scene`."""
    found = match(reading, scene)
    right = tuple(found.get(name) for name in ATTRIBUTES)
    return Asked(head, describe(scene, rng) + tail, yes_no(all(found.values())), right)


def described(scene: Scene, rng: np.random.Generator, image: bool) -> Scene:
    """A scene to ask about: this one, this one changed in one place, or another; some of them shortened."""
    drawn = rng.random()
    if drawn >= TRUE + NEAR:
        scene = sample_scenes(rng, 3, image=image)[int(rng.integers(3))]
    elif drawn >= TRUE:
        scene = changed(scene, rng, image)
    return abridge(scene, rng, 0.6) if rng.random() < SHORTENED else scene


def changed(scene: Scene, rng: np.random.Generator, image: bool = False) -> Scene:
    """The scene with one thing wrong: another value somewhere, two values exchanged, a figure too few, shots turned round."""
    while True:
        way = rng.random()
        if len(scene.figures) == 2 and way < 0.2:
            other = _exchanged(scene, rng)
        elif len(scene.figures) == 2 and way < 0.3:
            shot = scene.shots[int(rng.integers(len(scene.shots)))]
            other = Scene((Shot((shot.figures[int(rng.integers(len(shot.figures)))],), shot.background),))
        elif len(scene.shots) == 2 and way < 0.4:
            other = Scene(scene.shots[::-1])
        else:
            other = _altered(scene, rng, image)
        if other != scene and flaw(other) is None:
            return other


def _altered(scene: Scene, rng: np.random.Generator, image: bool) -> Scene:
    at = int(rng.integers(len(scene.shots)))
    shot = scene.shots[at]
    slot = int(rng.integers(len(shot.figures)))
    figure = shot.figures[slot]
    name = ("shape", "shape", "colour", "size", "motion", "background")[int(rng.integers(6))]
    values: dict[str, Sequence[Any]] = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "motion": MOTIONS}
    if name == "background":
        shot = replace(shot, background=BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])
    elif (name == "motion" and image) or getattr(figure, name) is None:
        return scene
    else:
        value = values[name][int(rng.integers(len(values[name])))]
        figure = replace(figure, **{name: value})
        if name == "motion":  # what grows or shrinks has no size of its own
            size = None if value in ("growing", "shrinking") else figure.size or SIZES[int(rng.integers(3))]
            figure = replace(figure, size=size)
        shot = replace(shot, figures=(*shot.figures[:slot], figure, *shot.figures[slot + 1 :]))
    return Scene((*scene.shots[:at], shot, *scene.shots[at + 1 :]))


def _exchanged(scene: Scene, rng: np.random.Generator) -> Scene:
    name = ("shape", "colour", "motion")[int(rng.integers(3))]
    first, second = scene.figures
    a, b = replace(first, **{name: getattr(second, name)}), replace(second, **{name: getattr(first, name)})
    if name == "motion":
        a, b = replace(a, size=second.size), replace(b, size=first.size)
    if len(scene.shots) == 1:
        return Scene((replace(scene.shots[0], figures=(a, b)),))
    return Scene((replace(scene.shots[0], figures=(a,)), replace(scene.shots[1], figures=(b,))))


def in_order(scene: Scene) -> Scene:
    """The scene with the figures of a shot in the order of the palette, so that there is one caption for each clip."""
    shots = [
        replace(shot, figures=tuple(sorted(shot.figures, key=lambda figure: COLOURS.index(figure.colour or "red"))))
        for shot in scene.shots
    ]
    return Scene(tuple(shots))


def caption(scene: Scene, *, dense: bool = False) -> str:
    """The plain prompt of what is seen; the world has no more detail to give than that."""
    plain = describe(in_order(scene))
    if not dense:
        return plain
    moves = any(figure.motion for figure in scene.figures)
    return f"{'a video of' if moves else 'a picture of'} {plain}"


def attribute(scene: Scene, rng: np.random.Generator, image: bool) -> Asked:
    """A question of one attribute of one figure, told by its colour or its shape."""
    shot = scene.shots[int(rng.integers(len(scene.shots)))]
    figure = shot.figures[int(rng.integers(len(shot.figures)))]
    others = [other for other in scene.figures if other is not figure]
    true = rng.random() < 0.5
    by_colour = all(other.colour != figure.colour for other in others)
    by_shape = all(other.shape != figure.shape for other in others)
    ways = ["shape", "motion"] * by_colour + ["colour"] * by_shape + ["background"] * (len(scene.shots) == 1)
    ways = [way for way in ways if way != "motion" or not image] or ["there"]
    way = ways[int(rng.integers(len(ways)))]

    def value(name: str, values: Sequence[Any], is_: Any) -> Any:
        wrong = [other for other in values if other != is_]
        return is_ if true else wrong[int(rng.integers(len(wrong)))]

    if way == "shape":
        text = f"Is the {figure.colour} shape a {value('shape', SHAPES, figure.shape)}?"
    elif way == "colour":
        text = f"Is the {figure.shape} {value('colour', COLOURS, figure.colour)}?"
    elif way == "motion":
        phrase = MOTION_PHRASES[value("motion", MOTIONS, figure.motion)][0]
        text = f"Is the {figure.colour} shape {phrase}?"
    elif way == "background":
        text = f"Is the background {value('background', BACKGROUNDS, shot.background)}?"
    else:
        figures = {(other.shape, other.colour) for other in scene.figures}
        shape = value("shape", SHAPES, figure.shape)
        true = (shape, figure.colour) in figures
        text = f"Is there a {figure.colour} {shape}?"
    return Asked("", text, yes_no(true))


def _either(usual: str, others: Sequence[str], rng: np.random.Generator) -> str:
    return usual if rng.random() < 0.8 else others[int(rng.integers(len(others)))]
