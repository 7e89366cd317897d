"""Where every sample starts from: its own standard normal noise, bitwise the same on every machine.

The key is made of the seed, the prompt and the sample's index, never of the model or the plan, so that two models or two
plans with one latent shape start from one noise and can be compared pair by pair. The numbers come from numpy's Philox
stream, because torch's CPU generator gives other numbers at another SIMD level.
"""

from __future__ import annotations

import hashlib

import numpy as np


def noise_key(seed: int, prompt_id: str, sample_index: int) -> str:
    """32 hex digits that name the noise of one sample."""
    text = f"noise/1\n{seed}\n{prompt_id}\n{sample_index}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def standard_normal(noise_key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 noise of `shape` for one sample; a shape's numbers are a prefix of a larger shape's."""
    stream = np.random.Generator(np.random.Philox(key=int(noise_key, 16)))
    return stream.standard_normal(shape, dtype=np.float32)


def noise_sha256(noise: np.ndarray) -> str:
    """What a row says of its noise, so that who draws it again can tell: sha256 of its float32 bytes in C order."""
    return hashlib.sha256(noise.astype("<f4", copy=False).tobytes()).hexdigest()
