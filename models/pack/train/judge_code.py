"""What a frame's tokens tell the judge's language model, made of what the renderer knows; as `code.py` does for latents.

Of each colour of the palette a token tells how much of the figure of that colour lies in its part of the frame and, times
that, the figure's shape, place, size and turn; and the background. The sum over a frame's tokens tells everything
once. Colours have channels of their own, so that two figures in one token stay apart. The language model learns to answer
from such tokens without a tower, the tower learns to tell them patch by patch (`eyes.py`), and at last both learn together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.pack.geometry import OUTLINES, coverage
from models.pack.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene
from models.pack.world import FRAME, NUM_FRAMES, Track, cut_frame, tracks

PATCH = 8
SIDE = FRAME // PATCH
MERGED = 4
"""Patches across and along that become one token: four tokens a frame."""
GAIN = 3.0
"""Of a channel that tells that something is there."""
MIDDLE = 7.6
"""Pixels: the radius of which nought is told."""
FIGURE = 1 + len(SHAPES) + 2 + 1 + 2
CODE = FIGURE * len(COLOURS) + len(BACKGROUNDS)

Array = np.ndarray


def patch_codes(scenes: Sequence[Scene], seeds: Sequence[int], shown: Array, num_frames: int = NUM_FRAMES) -> Array:
    """What each patch adds to its token, of the frames `shown` of clips as rendered: float32 [n, len(shown), 64, CODE]."""
    told = np.zeros((len(scenes), len(shown), SIDE * SIDE, CODE), np.float32)
    for clip, scene in enumerate(scenes):
        for row, frame in enumerate(shown):
            late = len(scene.shots) > 1 and frame >= cut_frame(num_frames)
            background = BACKGROUNDS.index(scene.shots[int(late)].background)  # type: ignore[arg-type]
            told[clip, row, :, FIGURE * len(COLOURS) + background] = GAIN / MERGED**2
    for track in tracks(scenes, seeds, num_frames=num_frames):
        rows = [row for row, frame in enumerate(shown) if 0 <= frame - track.start < len(track.x)]
        at = np.asarray([shown[row] - track.start for row in rows], dtype=int)
        if len(at):
            first = FIGURE * COLOURS.index(track.colour)
            told[track.clip, rows, :, first : first + FIGURE] += (
                _shares(track, at)[..., None] * _values(track, at)[:, None]
            )
    return told


def token_codes(patches: Array) -> Array:
    """Float32 [..., 64, CODE] of patches, [..., 4, CODE] of the tokens that they become."""
    blocks = patches.reshape(*patches.shape[:-2], SIDE // MERGED, MERGED, SIDE // MERGED, MERGED, CODE)
    return blocks.sum(axis=(-4, -2)).reshape(*patches.shape[:-2], -1, CODE)


def _shares(track: Track, at: Array) -> Array:
    """How much of the figure each patch shows, [k, 64]: 1 in all."""
    centres = np.arange(FRAME) + 0.5
    across, along = centres - track.x[at, None, None], centres[:, None] - track.y[at, None, None]
    mask = coverage(track.shape, across, along, track.r[at, None, None], track.angle[at, None, None])
    covered = mask.reshape(len(at), SIDE, PATCH, SIDE, PATCH).sum(axis=(2, 4)).reshape(len(at), -1)
    return covered / covered.sum(axis=1, keepdims=True)


def _values(track: Track, at: Array) -> Array:
    """What is told of the figure, [k, FIGURE]."""
    x, y, r = track.x[at], track.y[at], track.r[at]
    fold = OUTLINES[track.shape].fold
    turn = fold * track.angle[at]
    shape = np.zeros((len(at), len(SHAPES)))
    shape[:, SHAPES.index(track.shape)] = GAIN
    turned = [2 * np.cos(turn), 2 * np.sin(turn)] if fold else [0 * r, 0 * r]
    place = [6 * (x / FRAME * 2 - 1), 6 * (y / FRAME * 2 - 1), 5 * np.log(r / MIDDLE)]
    return np.concatenate([np.full((len(at), 1), GAIN), shape, np.stack([*place, *turned], axis=1)], axis=1)
