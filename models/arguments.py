"""Arrays as a diffusers pipeline takes them for arguments."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def argument_of(value: np.ndarray, dtype: torch.dtype, device: torch.device) -> Any:
    """A condition as the pipeline takes it: embeddings in the denoiser's precision, masks as they are, images as PIL."""
    import torch

    if value.dtype == np.uint8:
        from PIL import Image

        return Image.fromarray(value[0])
    tensor = torch.from_numpy(np.ascontiguousarray(value)).to(device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def step_noise(noise: np.ndarray) -> torch.Generator:
    """For schedulers that add noise at each step: a generator of the sample's own, seeded by its first noise."""
    import torch

    digest = hashlib.blake2b(np.ascontiguousarray(noise).tobytes(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
