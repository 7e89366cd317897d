"""Encode rendered clips once, so that the denoiser trains on latents: `folder`/latents/NNNNN.npz, each of PART clips.

    python -m models.pack.train.latents [--clips 40000]

Each file holds `latents`, float16 [PART, 16, 5, 8, 8], centred and scaled, and `prompts`, the plain prompt of each clip.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from models.pack.grammar import sample_scenes
from models.pack.phrases import describe
from models.pack.train.loop import arguments, set_up, stream
from models.pack.train.vae import encode
from models.pack.world import render

PART = 512


def main() -> None:
    from diffusers import AutoencoderKLWan

    parser = arguments(__doc__, steps=0, batch_size=16, learning_rate=0.0)
    parser.add_argument("--clips", type=int, default=40_000)
    options = parser.parse_args()
    device = set_up(options)
    model = AutoencoderKLWan.from_pretrained(options.folder / "vae").to(device).eval()
    folder = Path(options.folder) / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    ended = time.monotonic() + 60 * options.minutes
    for part in range(-(-options.clips // PART)):
        path = folder / f"{part:05d}.npz"
        if not path.exists():
            beside = path.with_suffix(".part.npz")
            np.savez(beside, allow_pickle=False, **encoded(model, options.seed, part, options.batch_size))
            beside.rename(path)
            print(path, flush=True)
        if time.monotonic() > ended:
            break


def encoded(model: torch.nn.Module, seed: int, part: int, batch_size: int) -> dict[str, np.ndarray]:
    """One file's clips, from training scenes only."""
    rng = stream(seed, 3_000_000, part)
    scenes = sample_scenes(rng, PART, split="train")
    seeds = [int(seed) for seed in rng.integers(1 << 62, size=PART)]
    mean, std = (torch.tensor(model.config[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))  # type: ignore[index,operator]
    made = [
        (encode(model, render(scenes[at : at + batch_size], seeds[at : at + batch_size])) - mean) / std
        for at in range(0, PART, batch_size)
    ]
    return {
        "latents": torch.cat(made).to(torch.float16).numpy(),
        "prompts": np.asarray([describe(scene) for scene in scenes]),
    }


if __name__ == "__main__":
    main()
