"""The latent code of the pack's VAE, made of what the renderer knows: what each 8x8 cell of a latent frame tells.

The first PICTURE channels are the lowest frequencies of the cell's pixels (a cosine transform of its block of four frames).
The others say in numbers which figure is near the cell: its shape, colour, place, size, turn and how it moves, faded out away
from it. Latents that carry what is seen beside how it looks are learnt by a diffusion model many times faster: as in ReDi
(Kouzelis et al. 2025, "Boosting Generative Image Modeling via Joint Image-Feature Synthesis") and VA-VAE (Yao et al. 2025),
which take the features of a vision model; a renderer knows better ones.

Causal like Wan's VAE: the first latent frame tells of the first frame alone, each other one of its own four.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi

import numpy as np

from models.pack.geometry import OUTLINES
from models.pack.grammar import SHAPES, Scene
from models.pack.world import FRAME, NUM_FRAMES, PALETTE, Track, render, tracks

CELL = 8
CELLS = FRAME // CELL
SPAN = 4
"""Frames of a latent frame, but for the first one."""
FREQUENCIES = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1))
"""In time, down and across."""
PICTURE = 3 * len(FREQUENCIES)
RIPPLE = 2.5
"""The higher frequencies are small, and are made larger."""
SCALE = 1.4
"""Of all channels, for a spread near that of the noise."""
NEAR = 12.0
"""Pixels from a cell's centre to a figure's within which the cell tells of it in full."""
FAR = 22.0
"""And from which on it tells nothing."""
MIDDLE = 7.6
"""Pixels: of a figure of this radius the code says nought."""
CHANNELS = PICTURE + 1 + len(SHAPES) + 3 + 2 + 1 + 2 + 4

Array = np.ndarray


def coded(scenes: Sequence[Scene], seeds: Sequence[int], *, num_frames: int = NUM_FRAMES) -> tuple[Array, Array]:
    """Clips as `render` makes them, and their code: float32 [n, CHANNELS, (T - 1) / 4 + 1, 8, 8]."""
    frames = render(scenes, seeds, num_frames=num_frames)
    told = np.zeros((len(frames), CHANNELS, 1 + (num_frames - 1) // SPAN, CELLS, CELLS), dtype=np.float32)
    told[:, :PICTURE] = picture(frames)
    nearest = np.full((len(frames), *told.shape[2:]), np.inf)
    for track in tracks(scenes, seeds, num_frames=num_frames):
        for at in range(told.shape[2]):
            _tell(track, at, told[track.clip, PICTURE:, at], nearest[track.clip, at])
    return frames, SCALE * told


def picture(frames: Array) -> Array:
    """The lowest frequencies of each cell: float32 [n, PICTURE, T', 8, 8] of uint8 [n, T, 64, 64, 3]."""
    pixels = frames.astype(np.float32) / 127.5 - 1
    pixels = np.concatenate([pixels[:, :1].repeat(SPAN, axis=1), pixels[:, 1:]], axis=1)
    blocks = pixels.reshape(len(frames), -1, SPAN, CELLS, CELL, CELLS, CELL, 3)
    waves = np.stack([RIPPLE ** (sum(wave) > 0) * _wave(*wave) for wave in FREQUENCIES])
    size = (len(frames), blocks.shape[1], CELLS, CELLS, 3)
    found = blocks.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(-1, waves[0].size) @ waves.reshape(len(waves), -1).T
    return found.reshape(*size, -1).transpose(0, 5, 4, 1, 2, 3).reshape(len(frames), PICTURE, -1, CELLS, CELLS)


def _wave(*frequencies: int) -> Array:
    """A product of cosines whose mean square is one, over the size of a block: [4, 8, 8]."""
    axes = [
        np.array([cos(pi * k * (x + 0.5) / size) for x in range(size)]) * (2**0.5 if k else 1.0) / size
        for k, size in zip(frequencies, (SPAN, CELL, CELL), strict=True)
    ]
    return np.einsum("a,b,c->abc", *axes).astype(np.float32)


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
        (x[-1] - x[0]) / 3,
        (y[-1] - y[0]) / 6,
        (y[0] - y.mean() + y[-1] - y.mean()) / 4,
        1.5 * (r[-1] - r[0]),
    ]
    here = distance < nearest
    nearest[here] = distance[here]
    for channel, value in enumerate(values):
        told[channel][here] = (share * value)[here]
