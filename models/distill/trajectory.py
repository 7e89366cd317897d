"""Trajectory-based few-step guidance: a student that steps from one kept state of its teacher's path to the next.

AccVideo (arXiv 2503.19462). With states x_i at sigmas s_i the student learns v so that an Euler step of its own schedule
lands on the teacher's next state: x_{i+1} = x_i + (s_{i+1} - s_i) v, the target is (x_{i+1} - x_i) / (s_{i+1} - s_i).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from models.distill.distance import HUBER, Distance, distances
from models.distill.student import Batch, Student, evenly, over

Weight = Literal["uniform", "state", "signal"]


@dataclass(frozen=True)
class Trajectory:
    """One step of each sample.

    `weight` says what is measured: `uniform` the velocity; `state` the state that is reached, where a velocity's difference
    counts as far as its step goes, |s_{i+1} - s_i|; `signal` the same over 1 - s_{i+1}, the share of the clean latent in
    that state: what a difference comes to at the end, if nothing mends it. Early states are nearly noise, so that a small
    difference there is a large one of the clip.
    """

    weight: Weight = "uniform"
    distance: Distance = "squared"
    huber: float = HUBER

    def __call__(self, student: Student, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        states, sigmas, timesteps = batch.path()
        rows, steps = torch.arange(len(states)), len(sigmas) - 1
        at = torch.from_numpy((evenly(rng, len(states)) * steps).astype(np.int64).clip(0, steps - 1))
        here, step = states[rows, at], (sigmas.diff())[at]
        target = (states[rows, at + 1] - here) / over(step, here)
        difference = student(here, timesteps[at], batch.prompt_embeds) - target
        if self.weight != "uniform":
            far = sigmas.diff() if self.weight == "state" else sigmas.diff() / (1 - sigmas[1:])
            difference = difference * over((far / far.mean())[at], here)
        return distances(difference, self.distance, self.huber).mean()
