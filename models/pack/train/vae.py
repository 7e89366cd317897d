"""Train the pack's video VAE: 4 frames to one, 8 pixels to one, 16 channels, on rendered clips.

    python -m models.pack.train.vae [--minutes 60]

Loss: mean absolute and squared difference, the absolute one of differences between neighbours (edges), and a little KL.
Steps on small windows around a figure, where there is something to learn, then on whole clips, without which the last frames
of a clip are worse than the first; at last the decoder alone.
The encoder folds 2x2 pixels into channels first (`patch_size`), so that no convolution runs at full size: decoding a clip
takes 0.1 CPU-seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.pack.grammar import sample_scenes
from models.pack.oracle import match, read
from models.pack.train.loop import Training, arguments, precision, set_up, stream
from models.pack.world import render

LATENT_CHANNELS = 16
CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}
EDGES = 0.5
KL = 1e-5
FIRST_LOGVAR = -6.0
"""A posterior that starts narrow lets the decoder see something from the first step on."""
WINDOW = 32
WINDOW_STEPS = 3_600
"""The first steps are on windows of WINDOW pixels and half of a clip's frames; for one whole clip there are four of them."""
ENCODER_STEPS = 5_400
"""After so many steps the encoder is exported and learns no more, so that clips can be encoded and the denoiser trained while
the decoder goes on: on whole clips and on windows of whole length by turns."""
DETAIL = 10.0
"""How much more the decoder's error counts where the picture differs from its surroundings. An edge is a small part of it."""
EXACT = 0.1
"""Share of steps in which nothing is drawn from the posterior."""
MEASURED = 256
"""Clips from which the latents' mean and spread are taken."""


def main() -> None:
    from diffusers import AutoencoderKLWan

    parser = arguments(__doc__, steps=9_000, batch_size=4, learning_rate=2e-3)
    parser.add_argument("--frames", type=int, default=9, help="frames of a window, 4k+1; a clip has twice as many")
    options = parser.parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    model = AutoencoderKLWan(**CONFIG)
    initialise(model)
    training = Training("vae", model.to(device), options)

    def make(step: int) -> np.ndarray:
        frames = options.frames if step < WINDOW_STEPS else 2 * options.frames - 1
        if step < WINDOW_STEPS or (step >= ENCODER_STEPS and step % 2):
            return windows(options.seed, step, 2 * options.batch_size, frames)
        return clips(options.seed, step, options.batch_size // 2, frames)

    def loss(step: int, data: np.ndarray) -> dict[str, torch.Tensor]:
        pixels = to_pixels(data, device)
        with precision(options, device):
            posterior = model.encode(pixels).latent_dist
            latents = posterior.mode() if step < EXACT * options.steps else posterior.sample()
            off = _decode_open(model, latents).float() - pixels
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        weight = 1 + DETAIL * _detail(pixels) if step >= ENCODER_STEPS else 1
        terms = {"l1": (weight * off.abs()).mean(), "l2": (weight * off.square()).mean()}
        return terms | {"edges": EDGES * _edges(off), "kl": KL * kl}

    if training.step < ENCODER_STEPS:
        training.run(make, loss, until=min(ENCODER_STEPS, options.steps))
    if training.step == ENCODER_STEPS:
        model.load_state_dict(training.average.weights)
        export(model, Path(options.folder) / "vae", options.seed)
    if training.step >= ENCODER_STEPS:
        model.train()
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
        training.run(make, loss)
    model.load_state_dict(training.average.weights)
    export(model, Path(options.folder) / "vae", options.seed)
    print(json.dumps(measure(model, options.seed)))


def clips(seed: int, step: int, batch_size: int, frames: int) -> np.ndarray:
    """Rendered windows of `frames` frames, uint8 [batch, frames, 64, 64, 3]; training scenes only."""
    rng = stream(seed, step)
    scenes = sample_scenes(rng, batch_size, split="train")
    whole = render(scenes, [int(seed) for seed in rng.integers(1 << 62, size=batch_size)])
    starts = rng.integers(whole.shape[1] - frames + 1, size=batch_size)
    return np.stack([clip[start : start + frames] for clip, start in zip(whole, starts, strict=True)])


def windows(seed: int, step: int, batch_size: int, frames: int) -> np.ndarray:
    """Small windows of clips, uint8 [batch, frames, WINDOW, WINDOW, 3]: of three places the one with most to see."""
    rng = stream(seed, step, 1)
    found = []
    for clip in clips(seed, step, batch_size, frames):
        places = [
            clip[:, y : y + WINDOW, x : x + WINDOW] for y, x in rng.integers(clip.shape[1] - WINDOW + 1, size=(3, 2))
        ]
        found.append(max(places, key=lambda place: float(place[frames // 2].std())))
    return np.stack(found)


def to_pixels(frames: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [n, T, H, W, 3] as float32 [n, 3, T, H, W] in -1..1."""
    return torch.as_tensor(frames).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """The other way round."""
    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()
    return values.to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def _decode_open(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the decoder makes before it is clamped to -1..1: beyond, a clamped value has no gradient and stays there."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    chunks: list[torch.Tensor] = []
    hook = model.decoder.register_forward_hook(lambda module, inputs, made: chunks.append(made))
    try:
        model.decode(latents)
    finally:
        hook.remove()
    return unpatchify(torch.cat(chunks, dim=2), model.config.patch_size)


def _edges(difference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference between neighbours, across, along and in time."""
    terms = [difference.diff(dim=axis).abs().mean() for axis in (2, 3, 4) if difference.shape[axis] > 1]
    return torch.stack(terms).sum() / 3


def _detail(pixels: torch.Tensor) -> torch.Tensor:
    """How far each pixel is from the mean of the 5x5 around it, in 0..2: [n, 1, T, H, W] of [n, 3, T, H, W]."""
    around = nn.functional.avg_pool3d(pixels, (1, 5, 5), stride=1, padding=(0, 2, 2), count_include_pad=False)
    return (pixels - around).abs().amax(dim=1, keepdim=True)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Weights that carry the picture through from the start: the default ones fade it, and cost a thousand steps.

    Each convolution keeps the variance, the last of a residual block adds little, and of the taps in time the newest leads:
    a clip begins as a row of pictures.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                module.weight.mul_(module.kernel_size[0] ** 0.5)
                module.weight[:, :, :-1].mul_(0.1)
            if name.endswith((".conv2", ".proj")):
                module.weight.mul_(0.1)
    model.quant_conv.weight[LATENT_CHANNELS:] = 0  # type: ignore[union-attr,index]
    model.quant_conv.bias[LATENT_CHANNELS:] = FIRST_LOGVAR  # type: ignore[union-attr,index]


@torch.no_grad()
def export(model: Any, folder: Path, seed: int) -> None:
    """Write the checkpoint, with the latents' mean and spread as measured on rendered clips."""
    model.eval()
    latents = torch.cat([encode(model, clips(seed, 1_000_000 + at, 8, 17)) for at in range(MEASURED // 8)])
    model.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )
    model.save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def encode(model: Any, frames: np.ndarray) -> torch.Tensor:
    """Latents as the VAE gives them, neither centred nor scaled: float32 [n, 16, (T - 1) / 4 + 1, 8, 8] on the CPU."""
    pixels = to_pixels(frames, next(model.parameters()).device)
    return model.encode(pixels).latent_dist.mode().float().cpu()


@torch.no_grad()
def measure(model: Any, seed: int, count: int = 64) -> dict[str, float]:
    """PSNR on held-out clips, and the share of attributes that the oracle reads as it does on the originals."""
    model.eval()
    rng = stream(seed, 2_000_000)
    scenes = sample_scenes(rng, count, split="held_out")
    frames = render(scenes, range(count))
    device = next(model.parameters()).device
    made = np.concatenate(
        [to_frames(model.decode(encode(model, frames[at : at + 8]).to(device)).sample) for at in range(0, count, 8)]
    )
    error = ((made.astype(np.float32) - frames) ** 2).mean(axis=(1, 2, 3, 4))
    right = [good for scene, clip in zip(scenes, made, strict=True) for good in match(read(clip), scene).values()]
    return {"psnr": float(np.mean(10 * np.log10(255**2 / error))), "attributes": float(np.mean(right))}


if __name__ == "__main__":
    main()
