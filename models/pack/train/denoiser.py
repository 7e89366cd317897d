"""Train the pack's denoiser and its text encoder together: flow matching on latents, with prompt dropout.

    python -m models.pack.train.denoiser [--minutes 240]

x_s = (1 - s) x + s e for noise e and s in 0..1; the model is given x_s, 1000 s and the prompt, and learns e - x. Where the
prompt is left out, it is the empty one, as guidance asks for. Some steps train on first frames alone, images, and some on
windows of longer clips, for DualParal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.pack.grammar import Figure, Kind, Motion, Scene, Shot, abridge, complete, is_held_out, sample_scenes
from models.pack.phrases import describe
from models.pack.train.code import CHANNELS, coded
from models.pack.train.loop import Training, arguments, precision, set_up, stream
from models.pack.train.text import WIDTH, build_encoder, build_tokenizer, embed, tokens
from models.pack.world import NUM_FRAMES

CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 5,
    "attention_head_dim": 48,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": 128,
    "ffn_dim": 960,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}
DROPOUT = 0.1
"""Share of prompts left out."""
SHORTENED = 0.25
"""Share of prompts that leave something unsaid."""
PART = 512
"""Clips rendered at a time."""
MIX: tuple[Kind, ...] = ("one", "two", "two", "cut")
"""Kinds of the clips: which of two figures moves how is learnt last."""
IMAGES = 0.15
"""Share of steps on images."""
WINDOWS = 0.1
"""Share of steps on windows of long clips: what a denoiser sees of a video that is sampled in blocks."""
WINDOW = (3, 4)
"""Latent frames of a window, at least and at most."""
LONG = 65
"""Frames of a long clip."""
ENDLESS: tuple[Motion, ...] = ("still", "spinning", "bouncing")
"""Motions that can go on for ever within the frame."""
SHIFT = 3.0
"""Towards noise: s = SHIFT u / (1 + (SHIFT - 1) u)."""


def main() -> None:
    parser = arguments(__doc__, steps=20_000, batch_size=32, learning_rate=2e-3)
    parser.add_argument("--clips", type=int, default=16_384, help="how many to render and train on")
    options = parser.parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, Path(options.folder) / "text_encoder").to(device)
    training = Training("denoiser", model, options)
    data = Clips(options.clips, options.seed)
    denoise = torch.compile(model["transformer"], dynamic=False) if options.compile else model["transformer"]

    def make(step: int) -> tuple[np.ndarray, list[str]]:
        return data.batch(stream(options.seed, step), options.batch_size)

    def loss(step: int, batch: tuple[np.ndarray, list[str]]) -> dict[str, torch.Tensor]:
        latents, prompts = batch
        with precision(options, device):
            prompt_embeds = embed(model["text_encoder"], *tokens(tokenizer, prompts, device))
            return {"flow": flow_loss(denoise, torch.as_tensor(latents).to(device).float(), prompt_embeds)}

    training.run(make, loss)
    model.load_state_dict(training.average.weights)
    for part in ("transformer", "text_encoder"):
        model[part].save_pretrained(Path(options.folder) / "denoiser" / part, safe_serialization=True)
    tokenizer.save_pretrained(Path(options.folder) / "denoiser" / "tokenizer")


def build_model(tokenizer: Any, text_encoder: Path) -> nn.ModuleDict:
    """The denoiser with random weights, and the text encoder as `text.py` left it, if it did."""
    from diffusers import WanTransformer3DModel
    from transformers import UMT5EncoderModel

    encoder = UMT5EncoderModel.from_pretrained(text_encoder) if text_encoder.exists() else build_encoder(tokenizer)
    return nn.ModuleDict({"transformer": WanTransformer3DModel(**CONFIG), "text_encoder": encoder})


def flow_loss(denoise: Callable[..., Any], latents: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity, each sample at a noise level of its own: even in u, spread over the batch."""
    count = len(latents)
    even = (torch.rand(()) + torch.arange(count) / count) % 1
    sigma = (SHIFT * even / (1 + (SHIFT - 1) * even)).to(latents.device)
    noise = torch.randn(latents.shape).to(latents.device)
    mix = sigma[:, None, None, None, None]
    velocity = denoise((1 - mix) * latents + mix * noise, 1000 * sigma, prompt_embeds, return_dict=False)[0]
    return (velocity.float() - (noise - latents)).square().mean()


class Clips:
    """The codes of `count` rendered clips of training scenes, in memory, and of a few long ones."""

    def __init__(self, count: int, seed: int) -> None:
        rng = stream(seed, 3_000_000)
        self.scenes = sample_scenes(rng, count, split="train", kinds=MIX)
        self.codes = _codes(self.scenes, rng, NUM_FRAMES)
        self.endless = _endless_scenes(rng, count // 16)
        self.long = _codes(self.endless, rng, LONG)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[str]]:
        """Codes float16 [size, CHANNELS, T, 8, 8] and a prompt for each: whole clips, first frames, or windows."""
        drawn = rng.random()
        if drawn < WINDOWS:
            chosen = rng.integers(len(self.long), size=size)
            length = int(rng.integers(WINDOW[0], WINDOW[1] + 1))
            starts = rng.integers(self.long.shape[2] - length + 1, size=size) * (rng.random(size) < 0.75)
            windows = [self.long[at, :, start : start + length] for at, start in zip(chosen, starts, strict=True)]
            return np.stack(windows), [_prompt(self.endless[at], rng) for at in chosen]
        chosen = rng.integers(len(self.codes), size=size)
        image = drawn < WINDOWS + IMAGES
        prompts = [_prompt(_first_frame(self.scenes[at]) if image else self.scenes[at], rng) for at in chosen]
        return self.codes[chosen][:, :, : 1 if image else None], prompts


def _codes(scenes: Sequence[Scene], rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """float16 [n, CHANNELS, (num_frames - 1) / 4 + 1, 8, 8]"""
    seeds = [int(each) for each in rng.integers(1 << 62, size=len(scenes))]
    starts = range(0, len(scenes), PART)
    parts = [coded(scenes[at : at + PART], seeds[at : at + PART], num_frames=num_frames)[1] for at in starts]
    return np.concatenate([part.astype(np.float16) for part in parts])


def _endless_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Of one figure or two that move for ever, as training may show them."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        moving = [Figure(motion=ENDLESS[int(rng.integers(len(ENDLESS)))]) for _ in range(1 + len(scenes) % 2)]
        scene = complete(Scene((Shot(tuple(moving)),)), rng)
        if not is_held_out(scene):
            scenes.append(scene)
    return scenes


def _first_frame(scene: Scene) -> Scene:
    shot = scene.shots[0]
    still = tuple(Figure(figure.shape, figure.colour, figure.size) for figure in shot.figures)
    return Scene((Shot(still, shot.background),))


def _prompt(scene: Scene, rng: np.random.Generator) -> str:
    drawn = rng.random()
    if drawn < DROPOUT:
        return ""
    return describe(abridge(scene, rng) if drawn < DROPOUT + SHORTENED else scene, rng)


if __name__ == "__main__":
    main()
