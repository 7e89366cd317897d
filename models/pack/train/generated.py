"""What the denoiser makes of prompts, for the VAE's decoder to learn from: latents, each with the clip that it tells.

    python -m models.pack.train.generated [--clips 2048]     # folder/generated/NNNN.npz, once the denoiser is trained

The denoiser's depths are wrong where its numbers are right, in narrow shapes above all. A decoder that has seen its latents
beside the clips that fit their numbers (`fitted.py`) draws by the numbers. What fits no clip of its prompt is kept for the
judge alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.pack.grammar import Scene, sample_scenes
from models.pack.phrases import describe, parse
from models.pack.train.assemble import FLOW_SHIFT
from models.pack.train.code import CELLS, CHANNELS, SPAN
from models.pack.train.denoiser import build_model
from models.pack.train.fitted import fitted
from models.pack.train.loop import PART, arguments, precision, read_parts, set_up, stream, write_parts
from models.pack.train.text import build_tokenizer, embed, tokens
from models.pack.world import FRAME, NUM_FRAMES

GUIDANCE = (1.75, 1.0, 1.75, 2.5)
"""Of the batches in turn."""
HARD = {"cross", "star"}
"""Shapes with narrow parts, which a decoder learns last: clips that show one are drawn three times as often."""
STEPS = 20
CLIP = (NUM_FRAMES, FRAME, FRAME, 3)


def main() -> None:
    parser = arguments(__doc__, steps=0, batch_size=0, learning_rate=0.0)
    parser.add_argument("--clips", type=int, default=2048, help="how many to make")
    options = parser.parse_args()
    device = set_up(options)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, Path(options.folder) / "text_encoder").to(device).eval()
    state = torch.load(Path(options.folder) / "denoiser.state.pt", map_location=device, weights_only=True)
    model.load_state_dict(state["average"])

    def make(part: int) -> dict[str, Any]:
        rng = stream(options.seed, 9_000_000, part)
        scenes = sample_scenes(rng, PART, split="train")
        with precision(options, device):
            latents = sampled(model, tokenizer, scenes, rng, GUIDANCE[part % len(GUIDANCE)])
        clips = [fitted(each, scene, rng) for each, scene in zip(latents, scenes, strict=True)]
        return {
            "scenes": [describe(scene) for scene in scenes],
            "latents": latents.astype(np.float16),
            "fits": [clip is not None for clip in clips],
            "frames": np.asarray([clip for clip in clips if clip is not None], np.uint8).reshape(-1, *CLIP),
        }

    write_parts(Path(options.folder) / "generated", options, make)


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, scenes: list[Scene], rng: np.random.Generator, guidance: float) -> np.ndarray:
    """Latents of clips of these scenes: float32 [n, CHANNELS, T', 8, 8]."""
    from diffusers import UniPCMultistepScheduler

    device = next(model.parameters()).device
    shape = (len(scenes), CHANNELS, 1 + (NUM_FRAMES - 1) // SPAN, CELLS, CELLS)
    latents = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)
    said = embed(model["text_encoder"], *tokens(tokenizer, [describe(scene, rng) for scene in scenes], device))
    unsaid = embed(model["text_encoder"], *tokens(tokenizer, [""] * len(scenes), device))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)
    scheduler.set_timesteps(STEPS, device=device)
    for timestep in scheduler.timesteps:
        at = timestep.expand(len(scenes))
        velocity = model["transformer"](latents, at, said, return_dict=False)[0].float()
        if guidance != 1.0:
            free = model["transformer"](latents, at, unsaid, return_dict=False)[0].float()
            velocity = free + guidance * (velocity - free)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.cpu().numpy()


class Generated:
    """All that `generated` made in a folder, in memory."""

    def __init__(self, folder: Path) -> None:
        parts = read_parts(folder)
        if not parts:
            raise SystemExit(f"{folder}: nothing there; run models.pack.train.generated first")
        self.scenes = [scene_of(str(prompt)) for part in parts for prompt in part["scenes"]]
        self.latents = np.concatenate([part["latents"] for part in parts])
        self.frames = np.concatenate([part["frames"] for part in parts])
        self.fits = np.flatnonzero(np.concatenate([part["fits"] for part in parts]))
        hard = [bool(HARD & {figure.shape for figure in self.scenes[at].figures}) for at in self.fits]
        often = np.where(hard, 3.0, 1.0)
        self.chances = often / max(often.sum(), 1.0)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips, uint8 [size, T, 64, 64, 3], and latents that tell them, float32 [size, CHANNELS, T', 8, 8]."""
        chosen = rng.choice(len(self.frames), size, p=self.chances)
        return self.frames[chosen], self.latents[self.fits[chosen]].astype(np.float32)


def scene_of(prompt: str) -> Scene:
    """The scene that a prompt of ours says."""
    scene = parse(prompt)
    assert scene is not None
    return scene


if __name__ == "__main__":
    main()
