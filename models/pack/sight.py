"""From pixels to figures: where each figure of a clip is in each frame, how large and of which colour, by classical vision.

The background is what the frame's edge shows; a cut is where it changes. Pixels that differ from it most, locally, are a
figure's core, and their colours say how many figures there are. Every other pixel then belongs to the nearest core, and how
far its colour has moved from the background's to the figure's is how much of it the figure covers: soft edges, blur and
noise change single pixels, and hardly change a sum over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from models.pack.geometry import Array
from models.pack.grammar import BACKGROUNDS, COLOURS, Background, Colour
from models.pack.world import FRAME, PALETTE

EDGE = 2
"""Pixels of the frame's edge that show the background."""
PLAIN = 0.8
"""Share of the edge that must look like its median."""
COLOUR_ERROR = 54.0
"""Largest distance in RGB at which a colour is still one of the palette."""
CONTRAST = 32.0
"""Least distance in RGB from the background of a pixel that shows something."""
DILUTION = (0.68, 1.15)
"""A thin figure's core is paler than its colour, as blur mixes it with the background: how much of the contrast is left."""
CORE = 0.9
"""A core pixel has at least this share of the contrast of its neighbourhood."""
LEAST_SHARE = 0.05
"""Share of the core pixels that a second figure has at least."""
UNKNOWN_SHARE = 0.2
"""Share of the core pixels that may have no colour of the palette."""
LEAST_CORES = 3
"""Core pixels in a frame that shows a figure: a blurred star has few."""
LEAST_PIXELS = 12
"""Pixels of the smallest figure."""
REGION = 3.5
"""How far from its core, in pixels, a figure's soft edge may reach."""
_YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])
LUMA_FIRST = (_YUV.T @ np.diag([1.0, 0.1, 0.1]) @ _YUV).astype(np.float32)
"""Metric in which masks are measured: codecs keep luma sharp and chroma at half the size."""
STRAY = 10.0
"""Pixels a frame, on average, that may show something and belong to no figure."""
SHORTEST = 4
"""Frames of the shortest shot."""


class UnreadableError(Exception):
    """Why nothing can be read off a clip, in words for a person."""


@dataclass(frozen=True)
class Seen:
    """One figure's track through a shot of n frames.

    time: int [n], in frames from the shot's start, with a gap where it was not seen. x, y, area: float [n], centroid and
    covered pixels. masks: float [n, p, p], how much it covers of each pixel of a window around it. across [n, 1, p],
    along [n, p, 1]: pixel centres of the window from the centroid.
    """

    colour: Colour
    time: Array
    x: Array
    y: Array
    area: Array
    masks: Array
    across: Array
    along: Array


@dataclass(frozen=True)
class SeenShot:
    """Figures in the order of their core pixels, most first."""

    background: Background
    figures: tuple[Seen, ...]


def look(frames: Array) -> Iterator[SeenShot]:
    """The shots of one clip, uint8 [T, H, W, 3]. UnreadableError for what is not a clip of the world."""
    import cv2

    if frames.shape[1:3] != (FRAME, FRAME):
        frames = np.stack([cv2.resize(frame, (FRAME, FRAME), interpolation=cv2.INTER_AREA) for frame in frames])
    colours, names = _backgrounds(frames)
    for background, when in _runs(names):
        difference = frames[when].astype(np.float32) - colours[when, None, None, :]
        yield SeenShot(background, tuple(_figures(difference, colours[when].mean(axis=0), background)))


def _backgrounds(frames: Array) -> tuple[Array, list[Background | None]]:
    """The colour of each frame's edge, float32 [T, 3], and its name; None where it is of no background's colour."""
    edge = np.zeros((FRAME, FRAME), dtype=bool)
    edge[:EDGE], edge[-EDGE:], edge[:, :EDGE], edge[:, -EDGE:] = True, True, True, True
    pixels = frames[:, edge].astype(np.float32)
    colours = np.median(pixels, axis=1)
    away = np.linalg.norm(pixels - colours[:, None], axis=2)
    plain = (away < COLOUR_ERROR).mean(axis=1) >= PLAIN
    palette = np.asarray([PALETTE[name] for name in BACKGROUNDS], dtype=np.float32)
    distance = np.linalg.norm(colours[:, None] - palette, axis=2)
    nearest = distance.argmin(axis=1)
    known = plain & (distance.min(axis=1) < COLOUR_ERROR)
    return colours, [BACKGROUNDS[at] if good else None for at, good in zip(nearest, known, strict=True)]


def _runs(names: list[Background | None]) -> list[tuple[Background, Array]]:
    """Each shot's background and frames, but for those next to a cut, which decoders and codecs smear."""
    if len(names) > 1 and names.count(None) == 1:
        known = [at for at, name in enumerate(names) if name is not None]
    elif None in names:
        raise UnreadableError("the background has no plain colour of the palette")
    else:
        known = list(range(len(names)))
    runs: list[tuple[Background, list[int]]] = []
    for at in known:
        name = names[at]
        assert name is not None
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(at)
    if len(runs) > 2 or (len(runs) == 2 and min(len(run) for _, run in runs) < SHORTEST):
        raise UnreadableError("the background flickers")
    if len(runs) == 2:
        runs = [(runs[0][0], runs[0][1][:-1]), (runs[1][0], runs[1][1][1:])]
    return [(name, np.asarray(run)) for name, run in runs]


def _figures(difference: Array, background: Array, name: Background) -> list[Seen]:
    """The figures of one shot from `difference`, float32 [n, 64, 64, 3], of each pixel from its frame's background."""
    import cv2

    smooth = np.stack([cv2.GaussianBlur(frame, (3, 3), 0.7) for frame in difference])
    contrast = np.linalg.norm(smooth, axis=3)
    window = np.ones((5, 5), dtype=np.uint8)
    highest = np.stack([cv2.dilate(frame, window) for frame in contrast])
    core = (contrast > CONTRAST) & (contrast >= CORE * highest)
    if core.sum() < LEAST_CORES * len(difference):
        raise UnreadableError("there is no figure")
    colour, known_cores = _core_colours(smooth[core], background, name)
    if (~known_cores).sum() > UNKNOWN_SHARE * core.sum():
        raise UnreadableError("something has no colour of the palette")
    known, nearest = core.copy(), np.zeros(core.shape, dtype=int)
    known[core], nearest[core] = known_cores, colour
    counts = np.bincount(nearest[known], minlength=len(COLOURS))
    present = [at for at in np.argsort(-counts)[:2] if counts[at] >= LEAST_SHARE * core.sum()]
    if counts[present].sum() < (1 - UNKNOWN_SHARE) * core.sum():
        raise UnreadableError("there are more colours than two and the background")
    vectors = [_vector(smooth[known & (nearest == at)], background, COLOURS[at]) for at in present]
    solids = _solids(smooth, contrast, known, nearest, present, vectors)
    if len(present) == 2 and counts[present[1]] < UNKNOWN_SHARE * core.sum() and not _stays(solids[1]):
        # Chroma that a codec has let bleed out of the first figure; a real figure left out is found to be stray below.
        present, solids, vectors = present[:1], solids[:1], vectors[:1]
    masks, stray = _cover(difference, contrast, solids, vectors)
    if stray > STRAY:
        raise UnreadableError("something is neither figure nor background")
    return [_track(COLOURS[at], mask, solid) for at, mask, solid in zip(present, masks, solids, strict=True)]


def _core_colours(cores: Array, background: Array, name: Background) -> tuple[Array, Array]:
    """For pixels [k, 3] less the background, the colour on whose way from there they lie best; and whether well enough."""
    vectors = np.asarray([PALETTE[colour] for colour in COLOURS], dtype=np.float32) - background
    along = np.einsum("kc,nc->kn", cores, vectors) / np.maximum((vectors**2).sum(axis=1), 1)
    on_way = np.clip(along, DILUTION[0], 1.0)
    error = np.linalg.norm(cores[:, None] - on_way[..., None] * vectors, axis=2)
    error[:, [at for at, colour in enumerate(COLOURS) if colour == name]] = np.inf
    nearest = error.argmin(axis=1)
    rows = np.arange(len(cores))
    share = along[rows, nearest]
    return nearest, (error[rows, nearest] < COLOUR_ERROR) & (share >= DILUTION[0]) & (share <= DILUTION[1])


def _vector(cores: Array, background: Array, colour: Colour) -> Array:
    """From the background to a figure's colour as it is in this clip. Cores paler than the palette are thin, not pale."""
    direction = np.median(cores, axis=0)
    length = np.linalg.norm(direction)
    expected = np.linalg.norm(np.asarray(PALETTE[colour]) - background)
    return direction / length * max(length, 0.92 * expected)


def _solids(
    smooth: Array, contrast: Array, known: Array, nearest: Array, present: list[int], vectors: list[Array]
) -> list[Array]:
    """For each colour and frame the connected pixels that hold most of its cores: bool [n, 64, 64]."""
    import cv2

    alongs = [smooth @ (vector / (vector @ vector)) for vector in vectors]
    errors = np.stack(
        [
            np.linalg.norm(smooth - along[..., None] * vector, axis=3)
            for along, vector in zip(alongs, vectors, strict=True)
        ]
    )
    owner = errors.argmin(axis=0)
    solids = []
    for number, (at, along) in enumerate(zip(present, alongs, strict=True)):
        mine = (owner == number) & (along > 0.4) & (contrast > 0.8 * CONTRAST)
        cores = known & (nearest == at)
        solid = np.zeros_like(mine)
        for frame in range(len(mine)):
            count, labels = cv2.connectedComponents(mine[frame].astype(np.uint8), connectivity=8)
            votes = np.bincount(labels[cores[frame]], minlength=count)
            votes[0] = 0
            if votes.max(initial=0) > 0:
                solid[frame] = labels == votes.argmax()
        solids.append(solid)
    return solids


def _cover(difference: Array, contrast: Array, solids: list[Array], vectors: list[Array]) -> tuple[list[Array], float]:
    """How much of each pixel each figure covers, and how many pixels a frame show something that is no figure's."""
    import cv2

    distance = np.full((len(solids), *contrast.shape), 4 * FRAME, dtype=np.float32)
    for number, solid in enumerate(solids):
        for frame in np.flatnonzero(solid.any(axis=(1, 2))):
            distance[number, frame] = cv2.distanceTransform((~solid[frame]).astype(np.uint8), cv2.DIST_L2, 3)
    owner = distance.argmin(axis=0)
    near = distance.min(axis=0) <= REGION
    masks = [
        np.where(near & (owner == number), difference @ (LUMA_FIRST @ vector / (vector @ LUMA_FIRST @ vector)), 0)
        for number, vector in enumerate(vectors)
    ]
    return masks, float((~near & (contrast > CONTRAST)).sum() / len(contrast))


def _there(solid: Array) -> Array:
    return solid.sum(axis=(1, 2)) >= LEAST_PIXELS


def _stays(solid: Array) -> bool:
    """Whether a figure is there in all frames, one at most excepted."""
    missing = int((~_there(solid)).sum())
    return missing <= (1 if len(solid) > SHORTEST else 0)


def _track(colour: Colour, masks: Array, solid: Array) -> Seen:
    there = _there(solid)
    if not _stays(solid):
        raise UnreadableError(f"the {colour} figure comes and goes")
    area = masks.sum(axis=(1, 2))
    masks, area = masks[there], area[there]
    centres = np.arange(FRAME) + 0.5
    x = (masks.sum(axis=1) @ centres) / area
    y = (masks.sum(axis=2) @ centres) / area
    side = min(FRAME, 2 * int(1.8 * np.sqrt(area.max() / np.pi) + 3))
    left, top = (np.clip(np.rint(at - side / 2), 0, FRAME - side).astype(int) for at in (x, y))
    windows = np.lib.stride_tricks.sliding_window_view(masks, (side, side), axis=(1, 2))
    across = left[:, None, None] + centres[None, None, :side] - x[:, None, None]
    along = top[:, None, None] + centres[None, :side, None] - y[:, None, None]
    return Seen(colour, np.flatnonzero(there), x, y, area, windows[np.arange(len(x)), top, left], across, along)
