"""The oracle: reads what a clip of the small world shows off its pixels, and compares it with what was asked for.

Classical vision all the way: colours and masks by models.pack.sight, shapes by comparing a mask with each outline at its
own area and turn, motion by straight lines through centroid, radius and turn. Nothing is learned, no prompt is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import log, pi

import numpy as np

from models.pack.geometry import OUTLINES, Array, coverage
from models.pack.grammar import ATTRIBUTES, RESIZED, SHAPES, SIZES, Figure, Motion, Scene, Shape, Shot, Size
from models.pack.sight import Seen, UnreadableError, look
from models.pack.world import FRAME, RADII

EDGE_ERROR = 0.55
"""How far, in pixels on average, a figure's edge may lie off the outline that it is read as."""
SOFTNESS = (0.0, 0.8, 1.2)
"""Blurs, in pixels, that a clip may have been through."""
SHAPE_FRAMES = 6
"""Frames in which shapes are compared."""

RADIUS_RANGE = (0.8, 1.25)
"""A radius is of a size if it lies at most this factor from it."""
GREW = 1.38
"""From the first frame to the last, a growing figure's radius changes by at least this factor."""
KEPT = 1.22
"""And that of all others by at most this one."""
MOVED = 5.0
"""Pixels from the first frame to the last that a moving figure gets at least."""
STAYED = 2.5
"""And all others at most."""
STEADY = 1.2
"""Greatest root mean square distance, in pixels, from a straight and even motion."""
STRAIGHT = 0.4
"""Greatest ratio of the way across to the way along the axis of a motion."""
TURNED = np.radians(5.0)
"""Turn from frame to frame of a figure that spins, at least."""
UPRIGHT = np.radians(2.5)
"""And of all others, at most."""
SWING = 2.0
"""Pixels on both sides of a turning point, at least."""
BOUNCED = 5.0
"""Pixels between the highest and the lowest point of a bouncing figure, at least."""


@dataclass(frozen=True)
class Reading:
    """What a clip shows: a scene with None for what cannot be told, or the reason why nothing can be read."""

    scene: Scene | None
    reason: str | None = None


def read(frames: np.ndarray) -> Reading:
    """Read one clip, or one image with T = 1: uint8 RGB [T, H, W, 3]."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"expected uint8 frames [T, H, W, 3], found {frames.dtype} {list(frames.shape)}")
    try:
        shots = tuple(
            Shot(tuple(_figure(seen, len(frames) > 1) for seen in shot.figures), shot.background)
            for shot in look(frames)
        )
    except UnreadableError as why:
        return Reading(None, str(why))
    if len(shots) > 1 and any(len(shot.figures) > 1 for shot in shots):
        return Reading(None, "there are two figures beside a cut")
    return Reading(Scene(shots))


def match(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether a clip shows what `scene` says, for each attribute that it says; all False if the clip is unreadable.

    `count` is that of shots and of figures in each, `shape`, `colour`, `size` and `motion` hold if every figure has
    the right one, `background` if every shot has. Figures are paired so that most is right.
    """
    seen = reading.scene
    said = _said(scene)
    if seen is None or len(seen.shots) != len(scene.shots):
        return dict.fromkeys(said, False)
    found = {"count": all(len(a.figures) == len(b.figures) for a, b in zip(seen.shots, scene.shots, strict=True))}
    pairs = [pair for a, b in zip(seen.shots, scene.shots, strict=True) for pair in _pairs(a.figures, b.figures)]
    for name in ATTRIBUTES:
        found[name] = all(_agree(name, figure, wanted) for figure, wanted in pairs)
    found["background"] = all(
        b.background in (None, a.background) for a, b in zip(seen.shots, scene.shots, strict=True)
    )
    return {name: found[name] for name in said}


def _said(scene: Scene) -> list[str]:
    names = [name for name in ATTRIBUTES if any(getattr(figure, name) is not None for figure in scene.figures)]
    return ["count", *names, *(["background"] if any(shot.background for shot in scene.shots) else [])]


def _pairs(seen: tuple[Figure, ...], wanted: tuple[Figure, ...]) -> list[tuple[Figure, Figure]]:
    """Each wanted figure with the one seen for it, with an empty one if too few are seen."""
    padded = (*seen, *(Figure(),) * (len(wanted) - len(seen)))
    best = max(
        permutations(padded, len(wanted)),
        key=lambda order: sum(_agree(name, *pair) for pair in zip(order, wanted, strict=True) for name in ATTRIBUTES),
    )
    return list(zip(best, wanted, strict=True))


def _agree(name: str, seen: Figure, wanted: Figure) -> bool:
    return getattr(wanted, name) in (None, getattr(seen, name))


def _figure(seen: Seen, moving: bool) -> Figure:
    turns = _turns(seen)
    shape = _shape(seen, turns)
    motion = _motion(seen, shape, turns) if moving else None
    size = None if motion in RESIZED else _size(float(np.median(np.sqrt(seen.area / pi))))
    return Figure(shape, seen.colour, size, motion)


def _size(radius: float) -> Size | None:
    best = min(SIZES, key=lambda size: abs(log(radius / RADII[size])))
    return best if RADIUS_RANGE[0] <= radius / RADII[best] <= RADIUS_RANGE[1] else None


def _shape(seen: Seen, turns: dict[Shape, Array]) -> Shape | None:
    """The outline that fits the masks best, if it does well."""
    misfit = _misfits(seen, turns)
    best = min(SHAPES, key=lambda shape: misfit[shape])
    edge = OUTLINES[best].perimeter * float(np.median(np.sqrt(seen.area / pi)))
    return best if misfit[best] <= EDGE_ERROR * edge else None


def _misfits(seen: Seen, turns: dict[Shape, Array]) -> dict[Shape, float]:
    """By how many pixels the masks differ from each outline of their area: the mean over frames, at the best of few blurs."""
    import cv2

    chosen = np.unique(np.linspace(0, len(seen.x) - 1, SHAPE_FRAMES).round().astype(int))
    r = np.sqrt(seen.area[chosen] / pi)[:, None, None]
    masks = np.clip(seen.masks[chosen], 0, 1).transpose(1, 2, 0)
    misfits: dict[Shape, float] = {}
    for shape in SHAPES:
        outlines = coverage(shape, seen.across[chosen], seen.along[chosen], r, turns[shape][chosen][:, None, None])
        crisp = np.ascontiguousarray(outlines.transpose(1, 2, 0))
        soft = [cv2.GaussianBlur(crisp, (0, 0), blur).reshape(crisp.shape) if blur else crisp for blur in SOFTNESS]
        misfits[shape] = min(float(np.abs(masks - each).sum()) for each in soft) / len(chosen)
    return misfits


def _turns(seen: Seen) -> dict[Shape, Array]:
    """How far a figure has turned in each frame, in radians, [n], were it of this shape: up to the shape's fold."""
    turns = {shape: np.zeros(len(seen.x)) for shape in SHAPES}
    for fold in {outline.fold for outline in OUTLINES.values()} - {0}:
        phase = np.angle(_harmonic(seen.masks, seen.across, seen.along, fold))
        turns |= {shape: (phase - _upright(shape)) / fold for shape in SHAPES if OUTLINES[shape].fold == fold}
    return turns


def _harmonic(masks: Array, across: Array, along: Array, fold: int) -> Array:
    """Sum over a mask of distance^2 e^(i fold angle) from its centroid: its phase turns `fold` times as fast."""
    place = across + 1j * along
    weight = masks * np.maximum(across**2 + along**2, 1e-6) ** (1 - fold / 2)
    return (weight * place**fold).sum(axis=(1, 2))


@cache
def _upright(shape: Shape) -> float:
    """Phase of the harmonic of an upright figure."""
    centres = np.arange(FRAME) + 0.5 - FRAME / 2
    across, along = centres[None, None, :], centres[None, :, None]
    mask = coverage(shape, across, along, np.full((1, 1, 1), 12.0), np.zeros(1))
    return float(np.angle(_harmonic(mask, across, along, OUTLINES[shape].fold))[0])


def _motion(seen: Seen, shape: Shape | None, turns: dict[Shape, Array]) -> Motion | None:
    """The motion, None if there are several at once, or none that is steady."""
    x, y, time = seen.x, seen.y, seen.time
    found: list[Motion] = []
    grown = _change(time, np.log(np.sqrt(seen.area)))
    if abs(grown) >= log(GREW):
        found.append("growing" if grown > 0 else "shrinking")
    elif abs(grown) > log(KEPT):
        return None
    swing = _swings(y) and np.ptp(y) >= BOUNCED
    if swing:
        found.append("bouncing")
    across, along = _change(time, x), _change(time, y)
    if not swing and np.hypot(across, along) >= MOVED:
        if min(abs(across), abs(along)) > STRAIGHT * max(abs(across), abs(along)) or _roughness(time, x, y) > STEADY:
            return None
        found.append(_direction(across, along))
    elif abs(across) > STAYED or (not swing and (abs(along) > STAYED or np.ptp(x) > MOVED or np.ptp(y) > MOVED)):
        return None
    if shape is not None and (fold := OUTLINES[shape].fold):
        phase = np.unwrap(fold * turns[shape])
        turn = abs(_change(time, phase)) / fold / max(time[-1] - time[0], 1)
        if turn >= TURNED:
            found.append("spinning")
        elif turn > UPRIGHT:
            return None
    if len(found) > 1:
        return None
    return found[0] if found else "still"


def _change(time: Array, values: Array) -> float:
    """From the first frame to the last along the straight line that fits best."""
    slope = float(np.polyfit(time, values, 1)[0]) if len(time) > 1 else 0.0
    return slope * float(time[-1] - time[0])


def _roughness(time: Array, x: Array, y: Array) -> float:
    """Root mean square distance from the straight line, in pixels."""
    off = [values - np.polyval(np.polyfit(time, values, 1), time) for values in (x, y)]
    return float(np.sqrt(np.mean(off[0] ** 2 + off[1] ** 2)))


def _direction(across: float, along: float) -> Motion:
    if abs(across) > abs(along):
        return "right" if across > 0 else "left"
    return "down" if along > 0 else "up"


def _swings(values: Array) -> int:
    """Turning points of a track, each at least SWING away from the one before and from either end."""
    turns, lowest, highest, heading = 0, values[0], values[0], 0
    for value in values:
        lowest, highest = min(lowest, value), max(highest, value)
        if heading >= 0 and highest - value >= SWING:
            turns += heading > 0
            heading, lowest = -1, value
        elif heading <= 0 and value - lowest >= SWING:
            turns += heading < 0
            heading, highest = 1, value
    return turns
