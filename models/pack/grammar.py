"""What can be said about the small world: the values of each attribute, the rules, and drawing scenes at random.

A clip shows one shot, or two with a cut between them; a shot shows one or two figures on a plain background. An
attribute that is None was not said. The rules leave out what nobody could see: a spinning circle, a red figure on red.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

if TYPE_CHECKING:
    import numpy as np

Shape = Literal["circle", "square", "triangle", "star", "ring", "cross"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
Background = Literal["white", "black", "grey", "blue", "yellow"]
Size = Literal["small", "medium", "large"]
Motion = Literal["left", "right", "up", "down", "still", "growing", "shrinking", "spinning", "bouncing"]
Kind = Literal["one", "two", "cut"]
Value = TypeVar("Value")

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
SIZES: tuple[Size, ...] = get_args(Size)
MOTIONS: tuple[Motion, ...] = get_args(Motion)
KINDS: tuple[Kind, ...] = get_args(Kind)
"""One figure; two figures in one shot; two shots of one figure each, with a cut between them."""

ATTRIBUTES = ("shape", "colour", "size", "motion")
"""The attributes of a figure. A shot has one more, its background."""

RESIZED: frozenset[Motion] = frozenset({"growing", "shrinking"})
"""Motions between the small and the large size; such a figure has no size of its own."""

ROUND: frozenset[Shape] = frozenset({"circle", "ring"})
"""Shapes whose spinning nobody can see."""

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Figure:
    """One figure. None: not said (motion is always None in an image, size in one that grows or shrinks)."""

    shape: Shape | None = None
    colour: Colour | None = None
    size: Size | None = None
    motion: Motion | None = None


@dataclass(frozen=True)
class Shot:
    """What is seen between two cuts: one or two figures, in the order in which they are said."""

    figures: tuple[Figure, ...]
    background: Background | None = None


@dataclass(frozen=True)
class Scene:
    """What a prompt says, or what was read off a clip: one shot or two."""

    shots: tuple[Shot, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        return tuple(figure for shot in self.shots for figure in shot.figures)

    @property
    def kind(self) -> Kind:
        if len(self.shots) > 1:
            return "cut"
        return "two" if len(self.figures) > 1 else "one"


def flaw(scene: Scene) -> str | None:
    """Why this scene is not of the world, in words for a person; None if it is."""
    counts = tuple(len(shot.figures) for shot in scene.shots)
    if counts not in ((1,), (2,), (1, 1)):
        return f"a clip shows one figure, two, or two shots of one figure each, not {counts}"
    for shot in scene.shots:
        for figure in shot.figures:
            if figure.motion == "spinning" and figure.shape in ROUND:
                return f"nobody can see a {figure.shape} spin"
            if figure.motion in RESIZED and figure.size is not None:
                return f"a {figure.motion} figure has no size of its own"
            if figure.colour is not None and figure.colour == shot.background:
                return f"nobody can see {figure.colour} on {shot.background}"
        colours = [figure.colour for figure in shot.figures if figure.colour is not None]
        if len(set(colours)) < len(colours):
            return "two figures in one shot have two colours"
    backgrounds = [shot.background for shot in scene.shots if shot.background is not None]
    if len(set(backgrounds)) < len(backgrounds):
        return "the background changes at a cut"
    return None


def is_complete(scene: Scene, *, image: bool = False) -> bool:
    """Whether everything that can be seen is said; an image shows no motion and no cut."""
    if image:
        return (
            scene.kind != "cut"
            and all(figure.shape and figure.colour and figure.size and not figure.motion for figure in scene.figures)
            and all(shot.background for shot in scene.shots)
        )
    return all(shot.background for shot in scene.shots) and all(
        figure.shape and figure.colour and figure.motion and (figure.size or figure.motion in RESIZED)
        for figure in scene.figures
    )


def complete(scene: Scene, rng: np.random.Generator, *, image: bool = False) -> Scene:
    """Draw whatever `scene` leaves unsaid; ValueError where no complete scene says the same."""
    if (why := flaw(scene)) is not None:
        raise ValueError(f"this scene cannot be completed: {why}")
    if image and (scene.kind == "cut" or any(figure.motion for figure in scene.figures)):
        raise ValueError("an image shows neither motion nor a cut")
    shots: list[Shot] = []
    for shot in scene.shots:
        taken = {figure.colour for figure in shot.figures} | {other.background for other in (*scene.shots, *shots)}
        background = shot.background or _pick(rng, [value for value in BACKGROUNDS if value not in taken])
        figures: list[Figure] = []
        for figure in shot.figures:
            taken = {background} | {other.colour for other in (*shot.figures, *figures)}
            figures.append(_complete_figure(figure, [value for value in COLOURS if value not in taken], rng, image))
        shots.append(Shot(tuple(figures), background))
    return Scene(tuple(shots))


def _complete_figure(figure: Figure, colours: Sequence[Colour], rng: np.random.Generator, image: bool) -> Figure:
    motion = figure.motion
    if motion is None and not image:
        barred = (RESIZED if figure.size else frozenset()) | ({"spinning"} if figure.shape in ROUND else frozenset())
        motion = _pick(rng, [value for value in MOTIONS if value not in barred])
    shapes = [value for value in SHAPES if motion != "spinning" or value not in ROUND]
    return Figure(
        shape=figure.shape or _pick(rng, shapes),
        colour=figure.colour or _pick(rng, colours),
        size=None if motion in RESIZED else figure.size or _pick(rng, SIZES),
        motion=motion,
    )


def abridge(scene: Scene, rng: np.random.Generator, keep: float = 0.5) -> Scene:
    """The scene of a shorter prompt: all but the shapes is left unsaid, each with probability 1 - `keep`."""
    shots = []
    for shot in scene.shots:
        figures = tuple(
            replace(figure, **{name: None for name in ATTRIBUTES[1:] if rng.random() >= keep})
            for figure in shot.figures
        )
        shots.append(Shot(figures, shot.background if rng.random() < keep else None))
    return Scene(tuple(shots))


def sample_scenes(
    rng: np.random.Generator,
    n: int,
    *,
    kinds: Sequence[Kind] = KINDS,
    split: Literal["train", "held_out", "all"] = "all",
    image: bool = False,
) -> list[Scene]:
    """Draw `n` complete scenes, their kinds in turn, each attribute evenly over the values that the rules leave."""
    if image and "cut" in kinds:
        kinds = [kind for kind in kinds if kind != "cut"]
    blank = {
        "one": Scene((Shot((Figure(),)),)),
        "two": Scene((Shot((Figure(), Figure())),)),
        "cut": Scene((Shot((Figure(),)), Shot((Figure(),)))),
    }
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = complete(blank[kinds[len(scenes) % len(kinds)]], rng, image=image)
        if split == "all" or is_held_out(scene) == (split == "held_out"):
            scenes.append(scene)
    return scenes


def is_held_out(scene: Scene) -> bool:
    """Whether training never shows this scene: one of its figures has a held-out trio of shape, colour and motion.

    The split is a hash, the same everywhere and for ever. Each pair of values occurs in training, so that what is
    measured on held-out scenes is putting known parts together anew.
    """
    return any(_is_held_out(figure.shape, figure.colour, figure.motion) for figure in scene.figures)


def _is_held_out(shape: Shape | None, colour: Colour | None, motion: Motion | None) -> bool:
    if shape is None or colour is None:
        return False
    digest = hashlib.blake2b(f"world/1 {shape} {colour} {motion}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def keeps(scene: Scene, said: Scene) -> bool:
    """Whether `scene` says everything that `said` says, figures in any order, and no figure or shot more."""
    return len(scene.shots) == len(said.shots) and all(
        shot.background == (asked.background or shot.background)
        and len(shot.figures) == len(asked.figures)
        and any(
            all(_agrees(figure, wanted) for figure, wanted in zip(order, asked.figures, strict=True))
            for order in permutations(shot.figures)
        )
        for shot, asked in zip(scene.shots, said.shots, strict=True)
    )


def _agrees(figure: Figure, wanted: Figure) -> bool:
    return all(getattr(wanted, name) in (None, getattr(figure, name)) for name in ATTRIBUTES)


def _pick(rng: np.random.Generator, values: Sequence[Value]) -> Value:
    return values[int(rng.integers(len(values)))]


def every_figure(motions: Iterable[Motion | None] = MOTIONS) -> list[Figure]:
    """Each complete figure of the world once, in a fixed order; a motion of None is that of an image."""
    figures = [
        Figure(shape, colour, size, motion)
        for motion in motions
        for shape in SHAPES
        for colour in COLOURS
        for size in ((None,) if motion in RESIZED else SIZES)
    ]
    return [figure for figure in figures if flaw(Scene((Shot((figure,)),))) is None]
