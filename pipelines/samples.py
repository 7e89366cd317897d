"""Samples of a release with their tensors, as exporters and trainers read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.storage import Storage


@dataclass(frozen=True)
class Trajectory:
    """Chosen states of the path that a teacher of N steps took from noise to the final latent.

    A state's place is named before the step: 0 is pure noise, k is what step k starts from, N the final latent.
    """

    states: np.ndarray
    """[S, *latent_shape] float32."""
    places: tuple[int, ...]
    """Of each state, ascending, 0 to N."""
    timesteps: tuple[float, ...]
    """That the denoiser is given at each state; 0 at the final latent."""
    sigmas: tuple[float, ...]
    """Share of noise in each state, where the scheduler is a flow's; 0 at the final latent."""
    steps: int
    """N."""


@dataclass(frozen=True)
class StoredSample:
    """One row of a release, and what it refers to. Each method reads storage anew."""

    storage: Storage
    row: Mapping[str, Any]
    """Columns of pipelines.decisions.DECIDED."""

    def latents(self) -> np.ndarray:
        """The final latent, float32 of the row's latent shape: "C T H W", images "C H W"."""
        raise NotImplementedError

    def noise(self) -> np.ndarray:
        """The noise it started from, float32 of the same shape, drawn from its key and held to its recorded sha256."""
        raise NotImplementedError

    def trajectory(self) -> Trajectory:
        """The kept states of its path. UserError where the dataset keeps none."""
        raise NotImplementedError

    def text(self) -> Mapping[str, np.ndarray]:
        """What the denoiser was conditioned on, unpadded: `prompt_embeds` [tokens, width] float32 and whatever else its
        family takes, by the pipeline's argument, without the batch axis. UserError where the dataset keeps none."""
        raise NotImplementedError

    def negative_text(self) -> Mapping[str, np.ndarray]:
        """The same of its negative prompt, by the same names (no prefix); empty where it was sampled without guidance."""
        raise NotImplementedError

    def media(self) -> tuple[bytes, str]:
        """The encoded media and its suffix: mp4, webp or png. UserError where there is none (recipe prompts)."""
        raise NotImplementedError


def read_samples(
    storage: Storage, release: str, *, since: str | None = None, rank: int = 0, world: int = 1
) -> Iterator[StoredSample]:
    """Samples of a release in its own fixed order, a file of rows at a time in memory.

    `since` leaves out those that are in that earlier release too. Of `world` readers each takes every `world`-th sample.
    """
    raise NotImplementedError
