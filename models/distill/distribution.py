"""Distribution matching: the student's samples are drawn to where its teacher finds more of them than it makes itself.

DMD2 (arXiv 2405.14867), as CausVid (2412.07772) and Self-Forcing (2506.08009) use it for flows. A student takes all of its
steps from fresh noise to a sample x, which is noised again. There the teacher, guided, and a critic, a copy of the teacher
that learns all the while what the student makes, say what the clean latent is, and

    dL/dx = (x_critic - x_teacher) / mean |x - x_teacher|

is where the two distributions differ. These papers train one step at a time and ask it for a whole sample, from wherever its
noise was drawn. Here the gradient goes back through all steps (as DRaFT does with a reward, 2309.17400): each is asked what
it does for the sample at the end, and one near pure noise need not end there.

Of the data only prompts are learnt from, and no path is followed, so that what a student cannot follow does not blur. It
wants a student that samples already, one of `trajectory`, to start from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.distill.student import Batch, Student, evenly, over

LEVELS = 0.02, 0.98
"""Least and most noise that samples are compared at."""


@dataclass
class Critic:
    """The student's own distribution: a denoiser that is trained on what it makes, `updates` times a step: each time on the
    samples of that step with other noise, where DMD2 makes new ones.

    `engine` is DeepSpeed's, with an optimizer of its own: called like a `Student`, with `backward` and `step`.
    """

    engine: Any
    updates: int
    shift: float
    _made: list[tuple[torch.Tensor, torch.Tensor, np.random.Generator]] = field(default_factory=list, init=False)

    def sees(self, clean: torch.Tensor, prompt_embeds: torch.Tensor, rng: np.random.Generator) -> None:
        """What the student has made in this step: [B, *latent_shape], of these prompts."""
        self._made.append((clean, prompt_embeds, rng))

    def update(self, student: nn.Module) -> None:
        made, self._made = self._made, []
        for _ in range(self.updates):
            for clean, prompt_embeds, rng in made:
                noised, noise, sigmas = noise_again(clean, self.shift, rng)
                velocity = self.engine(noised, 1000 * sigmas, prompt_embeds)
                self.engine.backward((velocity - (noise - clean)).square().mean())
                self.engine.step()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="critic", save_latest=False)

    def load(self, folder: Path, device: torch.device) -> None:
        found, _ = self.engine.load_checkpoint(str(folder), tag="critic")
        if found is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no critic here")


@dataclass(frozen=True)
class Distribution:
    """`teacher` is guided by `guidance_scale`; the student steps along `sigmas`, falling to 0, at `timesteps`, one fewer."""

    teacher: Student
    critic: Critic
    guidance_scale: float
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    shift: float

    def __call__(self, student: Student, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        prompts, like = batch.prompt_embeds, batch.noise
        clean = _normal(rng, like)
        for here, there, timestep in zip(self.sigmas, self.sigmas[1:], self.timesteps, strict=False):
            clean = clean + (there - here) * student(clean, like.new_full((len(like),), timestep), prompts)
        with torch.no_grad():
            made = clean.detach()
            noised, _, levels = noise_again(made, self.shift, rng)
            ours = noised - over(levels, made) * self.critic.engine(noised, 1000 * levels, prompts)
            theirs = noised - over(levels, made) * self._guided(noised, 1000 * levels, batch)
            far = (made - theirs).abs().flatten(1).mean(1).clamp_min(1e-3)
            wanted = made - (ours - theirs) / over(far, made)
        self.critic.sees(made, prompts, rng)
        return (clean - wanted).square().mean() / 2

    def _guided(self, latents: torch.Tensor, timestep: torch.Tensor, batch: Batch) -> torch.Tensor:
        prompted = self.teacher(latents, timestep, batch.prompt_embeds)
        if self.guidance_scale <= 1:
            return prompted
        if batch.negative_embeds is None:
            raise ValueError("a guided teacher needs negative prompts, and the batch has none")
        unprompted = self.teacher(latents, timestep, batch.negative_embeds)
        return unprompted + self.guidance_scale * (prompted - unprompted)


def noise_again(
    clean: torch.Tensor, shift: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of clean latents [B, *latent_shape]: noised ones, the noise, its share [B], a shifted flow's, even over the batch."""
    even = torch.from_numpy(evenly(rng, len(clean))).to(clean)
    sigmas = (shift * even / (1 + (shift - 1) * even)).clamp(*LEVELS)
    noise = _normal(rng, clean)
    return (1 - over(sigmas, clean)) * clean + over(sigmas, clean) * noise, noise, sigmas


def _normal(rng: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype=np.float32)).to(like)
