"""Sampling that is the same whatever stands beside a row in the batch.

The largest of logits / temperature + Gumbel noise is a draw from their softmax (Gumbel 1954; Maddison et al. 2014,
arXiv 1411.0030): with noise that is a row's own, greedy decoding samples.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key_of(clip: np.ndarray, text: str) -> int:
    """What a row's noise depends on: the pixels of its clip, and what is asked of it."""
    digest = hashlib.blake2b(
        repr(clip.shape).encode() + clip.tobytes() + text.encode("utf-8", "replace"), digest_size=16
    )
    return int.from_bytes(digest.digest(), "big")


class GumbelNoise:
    """A logits processor of transformers: scores [rows, vocabulary] / temperature, plus the noise of each row's key."""

    def __init__(self, keys: list[int], temperature: float) -> None:
        self._rows = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        noise = np.stack([row.gumbel(size=scores.shape[1]) for row in self._rows])
        return scores / self._temperature + torch.as_tensor(noise, dtype=scores.dtype, device=scores.device)
