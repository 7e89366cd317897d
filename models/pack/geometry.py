"""The shapes of the small world, as signed distances: negative inside, in pixels, y down, the centroid at the origin.

All shapes of one radius have the same area, that of a disc of this radius, so that size can be read off the area alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, radians, sin, sqrt, tan

import numpy as np

from models.pack.grammar import Shape

Array = np.ndarray

HOLE = 0.4
RING = 1 / sqrt(1 - HOLE**2)
"""Outer radius; that of the hole is HOLE times as large."""
SQUARE = sqrt(pi) / 2
"""Half a side."""
TRIANGLE = sqrt(4 * pi / (3 * sqrt(3)))
"""Circumradius."""
STAR = sqrt(pi / (5 * cos(radians(72)) * tan(radians(36))))
"""Circumradius of a pentagram."""
CROSS = sqrt(pi * 9 / 20)
"""Half of an arm's length from end to end; the arms are a third as wide as long."""


@dataclass(frozen=True)
class Outline:
    """One shape of radius 1.

    `distance(x, y, r)` takes arrays that broadcast. `corners`: points whose convex hull is the shape's, [k, 2], none for
    round ones. `reach`: from the centroid to the furthest point. `fold`: turned by 360/fold degrees it looks the same.
    `perimeter`: the length of its edge.
    """

    distance: Callable[[Array, Array, Array], Array]
    corners: Array
    reach: float
    fold: int
    perimeter: float


def _regular(corners: int, reach: float, first: float = -90.0) -> Array:
    angles = np.radians(first + 360 / corners * np.arange(corners))
    return reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _circle(x: Array, y: Array, r: Array) -> Array:
    return np.sqrt(x * x + y * y) - r


def _ring(x: Array, y: Array, r: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - (RING * (1 + HOLE) / 2) * r) - (RING * (1 - HOLE) / 2) * r


def _square(x: Array, y: Array, r: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - SQUARE * r


def _triangle(x: Array, y: Array, r: Array) -> Array:
    return np.maximum(y, (sqrt(3) / 2) * np.abs(x) - 0.5 * y) - (TRIANGLE / 2) * r


def _star(x: Array, y: Array, r: Array) -> Array:
    """A pentagram is where at most one of its five lines is crossed: the second largest of five distances."""
    first = second = None
    for k in range(5):
        angle = radians(-90 + 72 * k)
        line = cos(angle) * x + sin(angle) * y
        if first is None:
            first = line
        elif second is None:
            first, second = np.maximum(first, line), np.minimum(first, line)
        else:
            second = np.maximum(second, np.minimum(first, line))
            first = np.maximum(first, line)
    assert second is not None
    return second - (STAR * cos(radians(72))) * r


def _cross(x: Array, y: Array, r: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - (CROSS / 3) * r, np.maximum(x, y) - CROSS * r)


_ARM = np.array([[1, 1 / 3], [1, -1 / 3]]) * CROSS
_ARMS = np.concatenate([_ARM, -_ARM, _ARM[:, ::-1], -_ARM[:, ::-1]])

OUTLINES: dict[Shape, Outline] = {
    "circle": Outline(_circle, np.empty((0, 2)), 1, 0, 2 * pi),
    "square": Outline(_square, _regular(4, SQUARE * sqrt(2), 45), SQUARE * sqrt(2), 4, 8 * SQUARE),
    "triangle": Outline(_triangle, _regular(3, TRIANGLE), TRIANGLE, 3, 3 * sqrt(3) * TRIANGLE),
    "star": Outline(_star, _regular(5, STAR), STAR, 5, 10 * STAR * sin(radians(36)) / sin(radians(126))),
    "ring": Outline(_ring, np.empty((0, 2)), RING, 0, 2 * pi * RING * (1 + HOLE)),
    "cross": Outline(_cross, _ARMS, CROSS * sqrt(10) / 3, 4, 8 * CROSS),
}


def support(shape: Shape, r: Array, angle: Array, directions: Array) -> Array:
    """How far a figure reaches from its centroid in each of `directions`, [k, 2] unit vectors: [n, k] for r, angle [n]."""
    outline = OUTLINES[shape]
    if not len(outline.corners):
        return np.repeat(outline.reach * r[:, None], len(directions), axis=1)
    c, s = np.cos(angle), np.sin(angle)
    turned = np.einsum("ck,kdn->cdn", outline.corners, np.array([[c, s], [-s, c]]))
    return np.einsum("cdn,kd->ckn", turned, directions).max(axis=0).T * r[:, None]


def coverage(shape: Shape, x: Array, y: Array, r: Array, angle: Array) -> Array:
    """How much of each pixel a figure covers, 0..1 float32.

    x, y: pixel centres from the figure's centroid; r: its radius; angle: how far it has turned, clockwise, in radians.
    """
    if np.any(angle):
        c, s = np.cos(angle), np.sin(angle)
        x, y = c * x + s * y, c * y - s * x
    distance = OUTLINES[shape].distance(x, y, r)
    np.subtract(0.5, distance, out=distance)
    return np.clip(distance, 0.0, 1.0, out=distance)
