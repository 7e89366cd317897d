"""Latent consistency: a student that says from any state of a path where the path ends.

"Consistency Models" (arXiv 2303.01469) and "Latent Consistency Models" (arXiv 2310.04378), in the words of a flow: with
f(x, s) = x - s v(x, s), for which f(x, 0) = x holds by itself, f at a state is drawn to f at the next state by a target
network, an average of the student's weights: |f(x_i, s_i) - f_target(x_{i+1}, s_{i+1})|, pseudo-Huber. LCM asks its teacher
for the next state; here it is in the data, guidance and all. Without states the straight line of the coupling serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from models.distill.distance import HUBER, Distance, distances
from models.distill.student import Batch, Student, evenly, over


@dataclass(frozen=True)
class Consistency:
    """`target` is the network that is averaged; `sigmas` and `timesteps` cut the line where `along` is coupling."""

    target: Student
    along: Literal["trajectory", "coupling"] = "trajectory"
    sigmas: tuple[float, ...] = ()
    """Falling from 1 to 0."""
    timesteps: tuple[float, ...] = ()
    """One for each sigma."""
    distance: Distance = "pseudo_huber"
    huber: float = HUBER

    def __call__(self, student: Student, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        rows = torch.arange(len(batch.noise))
        if self.along == "trajectory":
            states, sigmas, timesteps = batch.path()
        else:
            sigmas, timesteps = (
                torch.tensor(values, device=batch.noise.device) for values in (self.sigmas, self.timesteps)
            )
            states = None
        steps = len(sigmas) - 1
        at = torch.from_numpy((evenly(rng, len(rows)) * steps).astype(np.int64).clip(0, steps - 1))

        def state(place: torch.Tensor) -> torch.Tensor:
            if states is not None:
                return states[rows, place]
            share = over(sigmas[place], batch.noise)
            return (1 - share) * batch.latents + share * batch.noise

        def end(network: Student, place: torch.Tensor) -> torch.Tensor:
            here = state(place)
            return here - over(sigmas[place], here) * network(here, timesteps[place], batch.prompt_embeds)

        with torch.no_grad():
            wanted = end(self.target, at + 1)
        return distances(end(student, at) - wanted, self.distance, self.huber).mean()
