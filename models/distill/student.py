"""What a method learns from and what it trains: a batch of stored samples, and a denoiser that predicts a velocity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Batch:
    """Samples of one teacher. Its guidance is in them already: a student is trained, and used, without."""

    noise: torch.Tensor
    """[B, *latent_shape] float32: what each sample started from."""
    latents: torch.Tensor
    """[B, *latent_shape] float32: where it ended."""
    prompt_embeds: torch.Tensor
    """[B, tokens, width] float32, padded with zeros as the teacher saw it."""
    states: torch.Tensor | None = None
    """[B, S, *latent_shape] float32: states of its path, the first pure noise, the last the final latent; or none."""
    sigmas: torch.Tensor | None = None
    """[S] float32: share of noise in each state, falling to 0."""
    timesteps: torch.Tensor | None = None
    """[S] float32: what a denoiser is given at each state; the last is never used."""
    negative_embeds: torch.Tensor | None = None
    """As prompt_embeds, of the negative prompts: where a method asks the guided teacher."""

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def path(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States, sigmas and timesteps. ValueError where there are none."""
        if self.states is None or self.sigmas is None or self.timesteps is None:
            raise ValueError("this method needs states of trajectories, and the batch has none")
        return self.states, self.sigmas, self.timesteps


class Student(Protocol):
    """A denoiser: latents [B, *latent_shape] float32, timestep [B] in 0..1000 and embeddings give the velocity dx/dsigma,
    float32 of the shape of the latents."""

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor: ...


Loss = Callable[[Student, Batch, np.random.Generator], torch.Tensor]
"""A method: a scalar of a student and a batch; what it draws it draws from the generator."""


class Denoiser(nn.Module):
    """A Wan transformer as a student. `autocast` computes in that type with weights that stay what they are."""

    def __init__(self, transformer: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.autocast = autocast

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if self.autocast else next(self.transformer.parameters()).dtype
        with ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(latents.device.type, dtype=self.autocast))
                if latents.device.type == "cpu":  # the fused attention is slow backwards
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            velocity = self.transformer(
                hidden_states=latents.to(dtype),
                timestep=timestep,
                encoder_hidden_states=prompt_embeds.to(dtype),
                return_dict=False,
            )[0]
        return velocity.float()


def evenly(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count] in 0..1, uniform each and spread evenly over the batch, in random order."""
    return rng.permutation((rng.random() + np.arange(count)) / count)


def over(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], to multiply samples of `like` with."""
    return values.to(like).reshape(-1, *([1] * (like.ndim - 1)))
