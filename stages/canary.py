"""A canary: a sample that every sampler group makes before anything else of it counts.

A device that computes wrongly says nothing of it. So each group denoises the same prompt from the same noise, in two steps
that go through all of the model, and what comes out is held against what the first group made: to the bit on the same kind of
device, within a tolerance on another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from stages.batch import Batch, SampleError, Stage, texts

PROMPT = "a red circle"
STEPS = 2
TOLERANCE = 0.05
"""Between kinds of devices: root mean square of the difference by that of the sample. bfloat16 alone is good for 0.01."""


def canary_batch(first: Batch) -> Batch:
    """The canary of a run, out of the first sample that it plans: its shape and inputs, and a prompt that says something."""
    return {**first, "prompt": texts([PROMPT]), "batch_index": np.zeros(1, np.int64)}


def taken_through(stages: tuple[Stage, ...], batch: Batch) -> Batch | None:
    """The canary after those of `stages` that make latents of it; None where it cannot be made, which says nothing."""
    try:
        for stage in stages:
            if stage.name in ("encode", "sample"):
                batch = _shortened(stage)(batch)
    except SampleError:
        return None
    return batch


def made_of(batch: Batch) -> tuple[str, np.ndarray] | None:
    """The kind of device that made it, and the latents, or frames of a pipeline that runs whole."""
    made = batch.get("latents", batch.get("frames"))
    return None if made is None else (str(batch["device"][0]), made)


def _shortened(stage: Any) -> Stage:
    """The stage with few steps and no look, if it samples; by all of a group; with its model, if that is delivered."""
    if hasattr(stage, "stage"):
        return replace(stage, stage=_shortened(stage.stage))
    if stage.name != "sample":
        return stage  # type: ignore[no-any-return]
    whole = {"early": None} if hasattr(stage, "early") else {}
    return replace(stage, plan=replace(stage.plan.shortened(STEPS), accelerate=()), **whole)  # type: ignore[no-any-return]


class Canaries:
    """What the first group made, on each kind of device."""

    def __init__(self) -> None:
        self._first: dict[str, np.ndarray] = {}

    def differs(self, kind: str, made: np.ndarray) -> str:
        """How a canary differs from the first one; empty where it does not."""
        if not np.isfinite(made).all():
            return "holds values that are not finite"
        known = self._first.get(kind)
        if known is not None:
            if known.tobytes() == made.tobytes():
                return ""
            return f"is {_distance(made, known):.2g} from that of the first group on {kind}; it must be the same to the bit"
        other = next(iter(self._first.items()), None)
        if other is not None and (distance := _distance(made, other[1])) > TOLERANCE:
            return (
                f"of {kind} is {distance:.2g} from that of the first group, on {other[0]}; at most {TOLERANCE} may be"
            )
        self._first[kind] = made
        return ""


def _distance(made: np.ndarray, known: np.ndarray) -> float:
    if made.shape != known.shape:
        return float("inf")
    difference = np.sqrt(np.mean((made.astype(np.float64) - known) ** 2))
    return float(difference / max(1e-12, np.sqrt(np.mean(known.astype(np.float64) ** 2))))
