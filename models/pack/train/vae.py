"""Train the pack's video VAE on rendered clips: the encoder to tell the code of `code.py`, the decoder to draw from it.

    python -m models.pack.train.vae [--minutes 60]

The code is known before the VAE is, so both halves learn at the same time. The decoder draws what the denoiser makes
(`generated.py`), with its errors, of small windows around a figure, where there is something to learn, and by turns of
whole clips; later, when the encoder has learnt what it will, by turns what it tells.
Its loss: mean absolute and squared difference, with weight on detail, and the absolute one of differences between neighbours.
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

from models.pack.grammar import Kind, sample_scenes
from models.pack.oracle import match, read
from models.pack.train.code import CELL, CHANNELS, GROUND, NUMBERS, coded
from models.pack.train.generated import Generated
from models.pack.train.loop import Training, arguments, precision, set_up, stream
from models.pack.world import render

CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": CHANNELS,
    "dim_mult": [1, 2, 8],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * CHANNELS,
    "latents_std": [1.0] * CHANNELS,
}
EDGES = 0.5
LOGVAR = -8.0
"""Of the posterior, the same everywhere: the code is drawn without it."""
SEEN: tuple[Kind, ...] = ("one", "two", "cut", "cut")
"""Kinds of the clips that are encoded: what a cut ends is all that an encoder must forget."""
WINDOW = 4
"""Cells along a window's side."""
APART = 0.5
"""Share of the steps in which the encoder learns too."""
DETAIL = 5.0
"""How much more an error counts where the picture differs from its surroundings. An edge is a small part of it."""


def main() -> None:
    from diffusers import AutoencoderKLWan

    options = arguments(__doc__, steps=16_000, batch_size=4, learning_rate=2e-3).parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    model = AutoencoderKLWan(**CONFIG)
    initialise(model)
    training = Training("vae", model.to(device), options)
    generated = Generated(Path(options.folder) / "generated")
    if not len(generated.frames):
        raise SystemExit(
            f"{options.folder}/generated: no clip shows its prompt; train the denoiser longer and make them anew"
        )

    def make(step: int) -> dict[str, np.ndarray]:
        rng = stream(options.seed, step)
        whole = options.batch_size // 2
        learns, turn = step < APART * options.steps, step % 3
        data = {}
        if learns or turn == 0:
            scenes = sample_scenes(rng, whole, split="train", kinds=rng.permutation(SEEN).tolist())
            data["frames"], data["code"] = coded(scenes, [int(seed) for seed in rng.integers(1 << 62, size=whole)])
        if learns or turn == 1:
            data["shown"], data["latents"] = generated.batch(rng, whole)
        if turn == 2:
            data["shown"], data["latents"] = windows(*generated.batch(rng, options.batch_size), rng)
        return data

    def loss(step: int, data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        learns, terms = "frames" in data and "shown" in data, {}
        with precision(options, device):
            if "frames" in data:
                pixels = to_pixels(data["frames"], device)
                with torch.set_grad_enabled(learns):
                    latents = model.encode(pixels).latent_dist.mode().float()
                terms["code"] = (latents - torch.as_tensor(data["code"]).to(device)).square().mean()
            if "shown" in data:
                pixels, latents = to_pixels(data["shown"], device), torch.as_tensor(data["latents"]).to(device)
            off = _decode_open(model, latents).float() - pixels
        weight = 1 + DETAIL * _detail(pixels)
        return {
            **terms,
            "l1": (weight * off.abs()).mean(),
            "l2": (weight * off.square()).mean(),
            "edges": EDGES * _edges(off),
        }

    training.run(make, loss)
    model.load_state_dict(training.average.weights)
    model.eval()
    model.save_pretrained(Path(options.folder) / "vae", safe_serialization=True)
    print(json.dumps(measure(model, options.seed)))


def windows(frames: np.ndarray, code: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A window of each clip and its code, [n, T, 32, 32, 3] and [n, C, T', 4, 4]: of three places the one that shows most."""
    shown, told = [], []
    for clip, each in zip(frames, code, strict=True):
        places = rng.integers(each.shape[-1] - WINDOW + 1, size=(3, 2))
        cuts = [(slice(y, y + WINDOW), slice(x, x + WINDOW)) for y, x in places]
        down, across = max(cuts, key=lambda cut: float(each[GROUND:NUMBERS, :, *cut].std()))
        told.append(each[:, :, down, across])
        shown.append(clip[:, *(slice(CELL * cut.start, CELL * cut.stop) for cut in (down, across))])
    return np.stack(shown), np.stack(told)


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
    model.quant_conv.weight[CHANNELS:] = 0  # type: ignore[union-attr,index]
    model.quant_conv.bias[CHANNELS:] = LOGVAR  # type: ignore[union-attr,index]


@torch.no_grad()
def encode(model: Any, frames: np.ndarray) -> torch.Tensor:
    """What the VAE tells: float32 [n, CHANNELS, (T - 1) / 4 + 1, 8, 8] on the CPU."""
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
