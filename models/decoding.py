"""From latents to pixels: one way for every family, because their autoencoders state their scaling in one vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from models.families import Family

if TYPE_CHECKING:
    import torch

SCALING = "vae_latents = latents * std / scaling_factor + mean + shift_factor"

DECODED_PIXELS = 1 << 21
"""Pixels decoded at once: a fixed number, because a batch of another size may give other last bits."""


def scaling_of(vae: Any) -> dict[str, Any]:
    """The constants of `SCALING`: std and mean by channel (or one for all), scaling_factor, shift_factor."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        buffers = dict(vae.named_buffers())
        mean, std = buffers.get("latents_mean"), buffers.get("latents_std")
    return {
        "mean": [0.0] if mean is None else [float(value) for value in mean],
        "std": [1.0] if std is None else [float(value) for value in std],
        "scaling_factor": float(config.get("scaling_factor") or 1.0),
        "shift_factor": float(config.get("shift_factor") or 0.0),
    }


def decode(family: Family, pipe: Any, latents: np.ndarray, height: int, width: int, num_frames: int) -> np.ndarray:
    """Pixels [n, num_frames, height, width, 3] uint8 RGB of latents [n, *latent_shape] float32."""
    import torch

    if family.media == "video":
        frames = (num_frames - 1) // family.temporal_factor(pipe) + 1
        latents = latents[:, :, latents.shape[2] - frames :]
    at_once = max(1, DECODED_PIXELS // (height * width * num_frames))
    with torch.inference_mode():
        parts = [_decode(pipe, latents[start : start + at_once]) for start in range(0, len(latents), at_once)]
    return np.concatenate(parts)


def glimpse(
    family: Family, pipe: Any, shape: tuple[int, ...], media: tuple[int, int, int], frames: int, latents: torch.Tensor
) -> np.ndarray:
    """Pixels uint8 [n, t, height, width, 3] of the first `frames` latent frames of `latents` as the pipeline holds them.

    `shape` is that of one sample's latents, `media` its height, width and number of frames. Decoders for video are causal:
    first frames need no others, and are those that the whole would begin with.
    """
    height, width, num_frames = media
    found = family.unpack(pipe, latents, shape).float().cpu().numpy()
    if family.media == "video":
        factor = family.temporal_factor(pipe)
        whole = (num_frames - 1) // factor + 1
        frames = min(frames, whole)
        found = found[:, :, found.shape[2] - whole :][:, :, :frames]
        num_frames = (frames - 1) * factor + 1
    return decode(family, pipe, found, height, width, num_frames)


def _decode(pipe: Any, latents: np.ndarray) -> np.ndarray:
    import torch

    vae = pipe.vae
    z = _unscaled(vae, torch.from_numpy(np.ascontiguousarray(latents)).to(pipe._execution_device)).to(vae.dtype)
    one_frame = z.ndim == 4 and vae.config.get("temperal_downsample") is not None
    if one_frame:  # Qwen-Image's autoencoder is one for video
        z = z[:, :, None]
    conditioned = bool(vae.config.get("timestep_conditioning"))  # LTX: decode as if free of noise
    timestep = (torch.zeros(len(z), device=z.device, dtype=vae.dtype),) if conditioned else ()
    if type(vae).__name__ == "AutoencoderKLWan" and not vae.use_tiling:
        return np.concatenate([_bytes(pixels) for pixels in _decode_causally(vae, z)], axis=1)
    pixels = vae.decode(z, *timestep, return_dict=False)[0]
    return _bytes(pixels if pixels.ndim == 5 else pixels[:, :, None])


def _decode_causally(vae: Any, z: torch.Tensor) -> Iterator[torch.Tensor]:
    """What `vae.decode` gives, latent frame by latent frame: a long video is never there whole in floating point."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    if hasattr(vae, "_hf_hook"):  # an offloaded one is brought to the device, as `decode` does
        vae._hf_hook.pre_forward(vae)
    vae.clear_cache()
    hidden = vae.post_quant_conv(z)
    for at in range(hidden.shape[2]):
        vae._conv_idx = [0]
        pixels = vae.decoder(
            hidden[:, :, at : at + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=at == 0
        )
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        yield pixels.clamp(-1.0, 1.0)
    vae.clear_cache()


def _bytes(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [n, t, h, w, 3] of [n, 3, t, h, w] in -1..1."""
    import torch

    values = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return values.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def _unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    scaling = scaling_of(vae)
    view = (1, -1, *([1] * (latents.ndim - 2)))
    mean = latents.new_tensor(scaling["mean"]).view(view)
    std = latents.new_tensor(scaling["std"]).view(view)
    return latents * std / scaling["scaling_factor"] + mean + scaling["shift_factor"]
