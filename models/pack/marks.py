"""The oracle as a judge: it marks a clip of the small world on the questions of the default rubric, each with 1 or 0.

What `judge.backend: oracle` scores with, and what the pack's own judge learns to answer. It reads pixels alone, and only
prompts of the grammar have an answer.
"""

from __future__ import annotations

import numpy as np

from models.pack.geometry import Array
from models.pack.grammar import Scene
from models.pack.oracle import Reading, match, read
from models.pack.phrases import parse, words_outside

VERSION = "1"
"""Changes whenever a clip may get another mark."""
QUESTIONS = ("prompt_match", "no_artefacts", "motion_smooth")
"""What is marked; of an image all but the last."""

GRAIN = 12.0
"""Most root mean square distance, in RGB, of a clean clip's outermost pixels from their frame's colour."""
FLICKER = 14.0
"""Most distance, in RGB, between the backgrounds of two frames of one shot."""


def marks(frames: np.ndarray, prompt: str) -> dict[str, float]:
    """1.0 or 0.0 for each of QUESTIONS; `frames` is uint8 [T, H, W, 3]. ValueError for a prompt outside the grammar.

    prompt_match: every attribute that the prompt says is there. no_artefacts: every figure has a shape and a
    colour of the world, and the background is plain. motion_smooth: every figure moves in one of the world's ways, or stands
    still, and nothing flickers.
    """
    scene = parse(prompt)
    if scene is None:
        outside = ", ".join(words_outside(prompt)) or "none, but they make no sentence of it"
        raise ValueError(f"the oracle judges prompts of the shapes world only; words outside it: {outside}")
    reading = read(frames)
    found = {"prompt_match": matches(reading, scene), "no_artefacts": is_clean(frames, reading)}
    if len(frames) > 1:
        found["motion_smooth"] = is_smooth(frames, reading)
    return {name: float(good) for name, good in found.items()}


def matches(reading: Reading, scene: Scene) -> bool:
    """Whether a clip that reads so shows everything that `scene` says."""
    return all(match(reading, scene).values())


def is_clean(frames: np.ndarray, reading: Reading) -> bool:
    """Whether every figure can be told for what it is, on a plain background."""
    if reading.scene is None or _grain(frames) > GRAIN:
        return False
    return all(figure.shape and figure.colour for figure in reading.scene.figures)


def is_smooth(frames: np.ndarray, reading: Reading) -> bool:
    """Whether every figure's motion can be told, and no frame flickers."""
    if reading.scene is None:
        return False
    steps = np.sort(np.linalg.norm(np.diff(np.median(_border(frames), axis=1), axis=0), axis=1))
    within = steps[: len(steps) + 1 - len(reading.scene.shots)]
    return bool(within.max(initial=0.0) <= FLICKER) and all(figure.motion for figure in reading.scene.figures)


def _grain(frames: np.ndarray) -> float:
    border = _border(frames)
    return float(np.sqrt(np.square(border - np.median(border, axis=1, keepdims=True)).sum(axis=2).mean()))


def _border(frames: np.ndarray) -> Array:
    """The outermost pixels, where no figure of the world ever is: float32 [T, n, 3]."""
    sides = [frames[:, 0], frames[:, -1], frames[:, 1:-1, 0], frames[:, 1:-1, -1]]
    return np.concatenate(sides, axis=1).astype(np.float32)
