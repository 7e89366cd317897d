"""The latent code of the pack's VAE, made of what the renderer knows: what each 8x8 cell of a latent frame tells.

Channels are, in this order: the background's colour; how deep the middle of each quarter of the cell lies in a figure, in
each of four frames (a signed distance, cut off); and, faded out away from it, numbers of the figure that is nearest: its
shape, colour, place, size, turn, and what has become of it since its shot began. Latents that carry what is seen beside how
it looks are learnt by a diffusion model many times faster: as in ReDi (Kouzelis et al. 2025, "Boosting Generative Image
Modeling via Joint Image-Feature Synthesis") and VA-VAE (Yao et al. 2025), which take a vision model's features; a renderer
knows better ones.

Causal like Wan's VAE: the first latent frame tells of the first frame alone, each other one of its own four.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import numpy as np

from models.pack.geometry import OUTLINES
from models.pack.grammar import SHAPES, Scene
from models.pack.world import FRAME, NUM_FRAMES, PALETTE, Track, render, tracks

CELL = 8
CELLS = FRAME // CELL
SPAN = 4
"""Frames of a latent frame, but for the first one."""
QUARTERS = 2
"""Parts of a cell, across and down, whose depth is told."""
GROUND = 3
DEPTHS = QUARTERS**2 * SPAN
STEEP = 5.0
"""Pixels outside or inside of an edge beyond which a depth is cut off."""
SCALE = 1.4
"""Of all channels, for a spread near that of the noise."""
NEAR = 12.0
"""Pixels from a cell's centre to a figure's within which the cell tells of it in full."""
FAR = 22.0
"""And from which on it tells nothing."""
MIDDLE = 7.6
"""Pixels: of a figure of this radius the code says nought."""
NUMBERS = GROUND + DEPTHS
"""The first channel of the numbers: how much the cell tells of a figure."""
CHANNELS = NUMBERS + 1 + len(SHAPES) + 3 + 2 + 1 + 2 + 4

Array = np.ndarray


def coded(scenes: Sequence[Scene], seeds: Sequence[int], *, num_frames: int = NUM_FRAMES) -> tuple[Array, Array]:
    """Clips as `render` makes them, and their code: float32 [n, CHANNELS, (T - 1) / 4 + 1, 8, 8]."""
    frames = render(scenes, seeds, num_frames=num_frames)
    length = 1 + (num_frames - 1) // SPAN
    told = np.zeros((len(frames), CHANNELS, length, CELLS, CELLS), dtype=np.float32)
    nearest = np.full((len(frames), length, CELLS, CELLS), np.inf)
    first = [0, *range(1, num_frames, SPAN)]
    # The corner shows the background in every frame.
    told[:, :GROUND] = (frames[:, first, 0, 0].transpose(0, 2, 1) / 127.5 - 1)[..., None, None]
    for track in tracks(scenes, seeds, num_frames=num_frames):
        depths = told[track.clip, GROUND:NUMBERS]
        np.maximum(depths, _depths(track, num_frames), out=depths)
        for at in range(length):
            _tell(track, at, told[track.clip, NUMBERS:, at], nearest[track.clip, at])
    return frames, SCALE * told


def _wrapped(angle: float) -> float:
    """The same direction between -pi and pi: a turn has no end, its number must have."""
    return (angle + pi) % (2 * pi) - pi


def _depths(track: Track, num_frames: int) -> Array:
    """0 far outside, 1 at the edge, 2 deep inside: [DEPTHS, T', 8, 8]."""
    size = CELLS * QUARTERS
    middles = (np.arange(size) + 0.5) * FRAME / size
    cos, sin = np.cos(track.angle)[:, None, None], np.sin(track.angle)[:, None, None]
    across, down = middles[None, None, :] - track.x[:, None, None], middles[None, :, None] - track.y[:, None, None]
    distance = OUTLINES[track.shape].distance(
        cos * across + sin * down, cos * down - sin * across, track.r[:, None, None]
    )
    deep = np.zeros((num_frames, size, size), dtype=np.float32)
    deep[track.start : track.start + len(track.x)] = np.clip(1 - distance / STEEP, 0, 2)
    deep = np.concatenate([deep[:1].repeat(SPAN, axis=0), deep[1:]])
    cut = deep.reshape(-1, SPAN, CELLS, QUARTERS, CELLS, QUARTERS).transpose(1, 3, 5, 0, 2, 4)
    return cut.reshape(DEPTHS, -1, CELLS, CELLS)


def _tell(track: Track, at: int, told: Array, nearest: Array) -> None:
    """Write into each cell of latent frame `at`, [channels, 8, 8], what it tells of this figure if no other is nearer."""
    first, last = (0, 1) if at == 0 else (1 + SPAN * (at - 1), 1 + SPAN * at)
    part = slice(first - track.start, last - track.start)
    if part.start < 0 or part.stop > len(track.x):
        return
    x, y, r = track.x[part], track.y[part], track.r[part]
    centres = CELL * (np.arange(CELLS) + 0.5)
    across, down = x.mean() - centres[None, :], y.mean() - centres[:, None]
    distance = np.hypot(across, down)
    share = np.clip((FAR - distance) / (FAR - NEAR), 0, 1)
    fold = OUTLINES[track.shape].fold
    turn = fold * track.angle[part].mean()
    values = [
        1.5,
        *(1.5 * (shape == track.shape) for shape in SHAPES),
        *(np.asarray(PALETTE[track.colour]) / 127.5 - 1),
        across / 10,
        down / 10,
        5 * np.log(r.mean() / MIDDLE),
        np.cos(turn) if fold else 0.0,
        np.sin(turn) if fold else 0.0,
        (x.mean() - track.x[0]) / 8,
        (y.mean() - track.y[0]) / 8,
        5 * np.log(r.mean() / track.r[0]),
        _wrapped(track.angle[part].mean()) / 1.5,
    ]
    here = distance < nearest
    nearest[here] = distance[here]
    for channel, value in enumerate(values):
        told[channel][here] = (share * value)[here]
