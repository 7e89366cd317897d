"""What the denoiser leaves of codes, for the VAE's decoder to learn from: half-noised codes, denoised again.

    python -m models.pack.train.leftovers [--clips 4096]     # folder/leftovers/NNNN.npz, once the denoiser is trained

As in SDEdit (Meng et al. 2022): a code noised part of the way and denoised again shows the clip that it showed before,
with the errors that the denoiser makes at that noise level and below. A decoder that has seen both what is left and
the clip itself draws crisp edges from codes that have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.pack.grammar import Scene, sample_scenes
from models.pack.phrases import describe, parse
from models.pack.train.code import coded
from models.pack.train.denoiser import build_model
from models.pack.train.loop import PART, arguments, precision, read_parts, set_up, stream, write_parts
from models.pack.train.text import build_tokenizer, embed, tokens
from models.pack.world import render

HIGHEST = 0.75
"""Noise levels are even from 0 to here. Above, another clip comes out than went in."""
STEPS = 6
HARD = {"cross", "star"}
"""Shapes with narrow parts, which a decoder learns last: clips that show one are drawn three times as often."""
GUIDANCE = 2.0
"""Of every other batch; the rest goes without."""


def main() -> None:
    parser = arguments(__doc__, steps=0, batch_size=0, learning_rate=0.0)
    parser.add_argument("--clips", type=int, default=4096)
    options = parser.parse_args()
    device = set_up(options)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, Path(options.folder) / "text_encoder").to(device).eval()
    state = torch.load(Path(options.folder) / "denoiser.state.pt", map_location=device, weights_only=True)
    model.load_state_dict(state["average"])

    def make(part: int) -> dict[str, Any]:
        rng = stream(options.seed, 9_000_000, part)
        scenes = sample_scenes(rng, PART, split="train")
        seeds = [int(seed) for seed in rng.integers(1 << 62, size=PART)]
        with precision(options, device):
            left = denoised_again(model, tokenizer, scenes, seeds, rng, GUIDANCE if part % 2 else 1.0)
        return {"scenes": [describe(scene) for scene in scenes], "seeds": seeds, "left": left}

    write_parts(Path(options.folder) / "leftovers", options, make)


@torch.no_grad()
def denoised_again(
    model: Any, tokenizer: Any, scenes: list[Scene], seeds: list[int], rng: np.random.Generator, guidance: float
) -> np.ndarray:
    """What is left of the codes of these clips: float16 [n, CHANNELS, T', 8, 8]."""
    device = next(model.parameters()).device
    code = torch.as_tensor(coded(scenes, seeds)[1]).to(device)
    noise = torch.from_numpy(rng.standard_normal(code.shape, dtype=np.float32)).to(device)
    highest = torch.from_numpy(HIGHEST * rng.random(len(code), dtype=np.float32)).to(device)
    said = embed(model["text_encoder"], *tokens(tokenizer, [describe(scene, rng) for scene in scenes], device))
    unsaid = embed(model["text_encoder"], *tokens(tokenizer, [""] * len(scenes), device))
    mix = highest[:, None, None, None, None]
    left = (1 - mix) * code + mix * noise
    for at in range(STEPS):
        sigma = highest * (1 - at / STEPS)
        velocity = model["transformer"](left, 1000 * sigma, said, return_dict=False)[0].float()
        if guidance != 1.0:
            free = model["transformer"](left, 1000 * sigma, unsaid, return_dict=False)[0].float()
            velocity = free + guidance * (velocity - free)
        left = left - mix / STEPS * velocity
    return left.cpu().numpy().astype(np.float16)


class Leftovers:
    """All that is left in a folder: what `leftovers` made, in memory."""

    def __init__(self, folder: Path) -> None:
        parts = read_parts(folder)
        self.scenes = [scene_of(str(prompt)) for part in parts for prompt in part["scenes"]]
        self.seeds = [int(seed) for part in parts for seed in part["seeds"]]
        self.left = np.concatenate([part["left"] for part in parts]) if parts else np.zeros(0)
        often = np.asarray([3.0 if HARD & {figure.shape for figure in scene.figures} else 1.0 for scene in self.scenes])
        self.chances = often / often.sum()

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips, uint8 [size, T, 64, 64, 3], and what is left of their codes, float32 [size, CHANNELS, T', 8, 8]."""
        chosen = rng.choice(len(self.seeds), size, p=self.chances)
        frames = render([self.scenes[at] for at in chosen], [self.seeds[at] for at in chosen])
        return frames, self.left[chosen].astype(np.float32)


def scene_of(prompt: str) -> Scene:
    """The scene that a prompt of ours says."""
    scene = parse(prompt)
    assert scene is not None
    return scene


if __name__ == "__main__":
    main()
