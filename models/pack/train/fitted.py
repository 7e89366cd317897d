"""The clip that a code tells by its numbers: where figures are, how large, in which colours.

Of a code that the denoiser made, numbers are right long before depths are. The clip that fits them best is what the decoder
should draw of it.
"""

from __future__ import annotations

import numpy as np

from models.pack.grammar import SHAPES, Figure, Scene
from models.pack.train.code import CELL, CELLS, GROUND, MIDDLE, NUMBERS, SCALE, SPAN
from models.pack.world import FRAME, PALETTE, Track, draw, path, spans

NEARBY = 0.6
"""Cells that tell of a figure at least so much are asked."""
CANDIDATES = 200
"""Ways of moving that are tried, and as many again near the best of them."""
NEAR = 0.1
WORST = 3.0
"""Pixels: root mean square distance between a path and what the cells tell, above which there is no such clip."""
WRONG_SIZE = 0.12
"""The same for the logarithm of the radius."""
SHAPE, COLOUR, PLACE, RADIUS, CHANGE = 1, 7, 10, 12, 15
"""Of a figure's numbers, behind how much the cell tells of it."""

Array = np.ndarray


def fitted(code: Array, scene: Scene, rng: np.random.Generator) -> Array | None:
    """The clip of `scene` that is told by `code`, [CHANNELS, T', 8, 8]: uint8 [T, 64, 64, 3]; None where it tells no such."""
    num_frames = 1 + SPAN * (code.shape[1] - 1)
    told = code.astype(np.float64) / SCALE
    tracks, colours = [], []
    for shot, (start, length) in zip(scene.shots, spans(scene, num_frames), strict=True):
        latents = range(-(-start // SPAN), (start + length + SPAN - 1) // SPAN)
        seen = told[:, latents.start : latents.stop]
        colours.append([_pixel(seen[:GROUND].mean(axis=(1, 2, 3)))])
        names = [str(figure.colour) for figure in shot.figures]
        for slot, figure in enumerate(shot.figures):
            found = _figure(seen[NUMBERS:], figure, names, slot, start, length, rng)
            if found is None:
                return None
            track, colour = found
            tracks.append(track)
            colours[-1].append(colour)
    frames = np.empty((1, num_frames, FRAME, FRAME, 3), dtype=np.uint8)
    draw(tracks, [colours], frames)
    return frames[0]


def _figure(
    numbers: Array, figure: Figure, names: list[str], slot: int, start: int, length: int, rng: np.random.Generator
) -> tuple[Track, Array] | None:
    """A figure's track, and its colour, from numbers of the latent frames that show its shot, [numbers, T', 8, 8]."""
    share = numbers[0] / 1.5
    shown = numbers / np.maximum(share, 0.1)
    palette = np.asarray([PALETTE[name] for name in names]) / 127.5 - 1
    nearest = np.square(shown[None, COLOUR:PLACE] - palette[:, :, None, None, None]).sum(axis=1).argmin(axis=0)
    weight = np.where((share > NEARBY) & (nearest == slot), share, 0.0)
    total = weight.sum(axis=(1, 2))
    if total.min() < 1.5:
        return None
    told = (shown * weight).sum(axis=(2, 3)) / total
    if SHAPES[int(told[SHAPE:COLOUR].mean(axis=1).argmax())] != figure.shape:
        return None
    centres = CELL * (np.arange(CELLS) + 0.5)
    across = ((10 * shown[PLACE] + centres) * weight).sum(axis=(1, 2)) / total
    down = ((10 * shown[PLACE + 1] + centres[:, None]) * weight).sum(axis=(1, 2)) / total
    radius = np.log(MIDDLE) + told[RADIUS] / 5
    draws = rng.random((CANDIDATES, 4))
    for near in (NEAR, 0.0):
        paths = [path(figure, length, draw) for draw in draws]
        x, y, r, _ = (_means(np.stack(part), start) for part in zip(*paths, strict=True))
        left, top = (across - x).mean(axis=1), (down - y).mean(axis=1)
        first = np.asarray([[each[0][0], each[1][0]] for each in paths])[:, :, None]
        off = np.square(across - x - left[:, None]) + np.square(down - y - top[:, None])
        off += np.square(8 * told[CHANGE] - x + first[:, 0]) + np.square(8 * told[CHANGE + 1] - y + first[:, 1])
        off = off.mean(axis=1)
        wrong_size = np.square(radius - np.log(r)).mean(axis=1)
        best, size = int(off.argmin()), int(wrong_size.argmin())
        if near:
            draws = np.clip(draws[best] + near * (rng.random((CANDIDATES, 4)) - 0.5), 0, 1)
            draws[:, 0] = rng.random(CANDIDATES)  # the radius has nothing to do with the way
    if off[best] ** 0.5 > WORST or wrong_size[size] ** 0.5 > WRONG_SIZE:
        return None
    x, y, _, angle = paths[best]
    shape, colour = figure.shape, figure.colour
    assert shape is not None and colour is not None
    track = Track(0, slot, shape, colour, start, x + left[best], y + top[best], paths[size][2], angle)
    return track, _pixel(told[COLOUR:PLACE].mean(axis=1))


def _means(values: Array, start: int) -> Array:
    """What a latent frame tells of its frames, [n, T'] of [n, T]: the first one of a clip tells of one."""
    first = values[:, :1] if start == 0 else values[:, :0]
    rest = values[:, first.shape[1] :]
    return np.concatenate([first, rest.reshape(len(values), -1, SPAN).mean(axis=2)], axis=1)


def _pixel(colour: Array) -> Array:
    return np.clip((colour + 1) * 127.5, 0, 255)
