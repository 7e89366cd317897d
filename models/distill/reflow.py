"""Rectified flow on stored couplings, and InstaFlow's straight distillation of the result.

"Flow Straight and Fast" (arXiv 2209.03003) learns the velocity noise - x of the straight line x_t = (1 - t) x + t noise
between a sample of the teacher and the noise it came from: one round makes paths nearly straight. "Improving the Training
of Rectified Flows" (arXiv 2405.20320) draws t from a U, p(t) ~ exp(a t) + exp(a (1 - t)) with a = 4 (its e^-at up to the
factor e^a that makes the two ends alike), and measures by pseudo-Huber. "InstaFlow" (arXiv 2309.06380) then learns the
whole line in one step, x = noise - v(noise, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.distill.distance import HUBER, Distance, distances
from models.distill.student import Batch, Student, evenly, over

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Reflow:
    """Velocity of straight lines. `u_shape` is a; 0 draws t evenly."""

    u_shape: float = 4.0
    distance: Distance = "pseudo_huber"
    huber: float = HUBER

    def __call__(self, student: Student, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        t = torch.from_numpy(u_shaped(rng, len(batch.noise), self.u_shape)).to(batch.noise)
        share = over(t, batch.noise)
        latents = (1 - share) * batch.latents + share * batch.noise
        velocity = student(latents, TRAIN_TIMESTEPS * t, batch.prompt_embeds)
        return distances(velocity - (batch.noise - batch.latents), self.distance, self.huber).mean()


@dataclass(frozen=True)
class Straight:
    """The whole line in one step from the noise, at the `timestep` that a schedule of one step gives."""

    timestep: float = 999.0
    distance: Distance = "pseudo_huber"
    huber: float = HUBER

    def __call__(self, student: Student, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        timestep = torch.full((len(batch.noise),), self.timestep, device=batch.noise.device)
        velocity = student(batch.noise, timestep, batch.prompt_embeds)
        return distances(velocity - (batch.noise - batch.latents), self.distance, self.huber).mean()


def u_shaped(rng: np.random.Generator, count: int, a: float) -> np.ndarray:
    """[count] of p(t) ~ exp(a t) + exp(a (1 - t)) on 0..1, spread evenly over the batch."""
    u = evenly(rng, count)
    t = np.log1p(u * np.expm1(a)) / a if a else u
    return np.where(rng.random(count) < 0.5, t, 1 - t)
