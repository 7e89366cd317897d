"""Clips with flaws, for the judge to learn from: spoilt pixels, latents of the trained VAE that are noised and blended, and
what the denoiser makes (`generated.py`).

    python -m models.pack.train.flaws [--clips 1500]     # folder/decoded/NNNN.npz, once the VAE is trained

Only the damage is made here; whether a clip still shows what it should, the oracle says (`questions.seen_as`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from models.pack.grammar import Scene, sample_scenes
from models.pack.oracle import Reading
from models.pack.phrases import describe, parse
from models.pack.train.generated import Generated, scene_of
from models.pack.train.loop import PART, arguments, read_parts, set_up, stream, write_parts
from models.pack.train.questions import Seen, seen_as
from models.pack.world import render

Clip = np.ndarray
"""uint8 [T, 64, 64, 3]."""


def spoilt(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """The clip with one flaw, slight or gross; some flaws mix in `other`."""
    flaw = FLAWS[int(rng.integers(len(FLAWS)))]
    made = flaw(clip.astype(np.float32), other.astype(np.float32), rng)
    return np.clip(made, 0, 255).round().astype(np.uint8)


def softened(clip: Clip, rng: np.random.Generator) -> Clip:
    """As a decoder softens it: still clean to a person."""
    kernel = rng.uniform(0.2, 0.8)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), kernel) for frame in clip]).astype(np.float32)
    grain = rng.standard_normal(clip.shape, dtype=np.float32) * np.float32(rng.uniform(0, 4))
    return np.clip(soft + grain + rng.uniform(-5, 5, 3), 0, 255).round().astype(np.uint8)


def _noisy(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    return clip + rng.standard_normal(clip.shape, dtype=np.float32) * np.float32(rng.uniform(4, 70))


def _half_denoised(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """Blotches of 4 to 16 pixels over a paler clip."""
    size = int(rng.choice([4, 8, 16]))
    coarse = rng.standard_normal((len(clip), size, size, 3), dtype=np.float32)
    blotches = np.stack([cv2.resize(frame, clip.shape[2:0:-1], interpolation=cv2.INTER_CUBIC) for frame in coarse])
    share = rng.uniform(0.1, 0.7)
    return (1 - share) * clip + share * (128 + 90 * blotches)


def _blurred(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    sigma = rng.uniform(1, 5)
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])


def _blended(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    share = rng.uniform(0.1, 0.5)
    return (1 - share) * clip + share * other


def _spliced(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    return np.where((np.arange(len(clip)) < rng.integers(2, len(clip) - 1))[:, None, None, None], clip, other)


def _halved(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """Another clip on one side."""
    axis = 1 + int(rng.integers(2))
    edge = np.linspace(0, 1, 64).reshape([-1 if at == axis else 1 for at in range(4)])
    share = np.clip((edge - rng.uniform(0.3, 0.7)) * rng.uniform(5, 40) + 0.5, 0, 1).astype(np.float32)
    return (1 - share) * clip + share * other


def _warped(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """Shapes bent by waves, that may run on from frame to frame."""
    y, x = np.mgrid[0:64, 0:64].astype(np.float32)
    long, high, run = rng.uniform(8, 24), rng.uniform(1, 5), rng.uniform(-1, 1) * (rng.random() < 0.5)
    phase = rng.uniform(0, 6.3, 2)
    frames = []
    for at, frame in enumerate(clip):
        bent_x = x + high * np.sin(y * 6.3 / long + phase[0] + run * at)
        bent_y = y + high * np.sin(x * 6.3 / long + phase[1] + run * at)
        frames.append(
            cv2.remap(
                frame,
                bent_x.astype(np.float32),
                bent_y.astype(np.float32),
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
        )
    return np.stack(frames)


def _stretched(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    scale = np.exp(rng.uniform(-0.5, 0.5, 2))
    where = np.asarray([[scale[0], 0, 32 * (1 - scale[0])], [0, scale[1], 32 * (1 - scale[1])]])
    return np.stack([cv2.warpAffine(frame, where, (64, 64), borderMode=cv2.BORDER_REPLICATE) for frame in clip])


def _frozen(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """Nothing moves after some frame, or before it."""
    at = int(rng.integers(0, len(clip) - 3))
    frames = np.minimum(np.arange(len(clip)), at)
    return clip[frames] if rng.random() < 0.7 else clip[np.maximum(np.arange(len(clip)), len(clip) - 1 - at)]


def _shuffled(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """Frames in another order, all or a few."""
    order = np.arange(len(clip))
    start = int(rng.integers(0, len(clip) - 5))
    length = int(rng.integers(5, len(clip) - start + 1))
    order[start : start + length] = rng.permutation(order[start : start + length])
    return clip[order]


def _jumping(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """Frames shifted to and fro."""
    frames, far = [], rng.uniform(1, 8)
    for frame in clip:
        x, y = rng.uniform(-far, far, 2)
        where = np.asarray([[1, 0, x], [0, 1, y]])
        frames.append(cv2.warpAffine(frame, where, (64, 64), borderMode=cv2.BORDER_REPLICATE))
    return np.stack(frames)


def _flickering(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    return clip * (1 + rng.uniform(0.03, 0.4) * rng.uniform(-1, 1, (len(clip), 1, 1, 1)))


def _reversed(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    return clip[::-1]


def _patched(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """A hole or a bar of some colour through the picture."""
    made = clip.copy()
    left, top = rng.integers(0, 56, 2)
    across, along = rng.integers(3, 24, 2)
    made[:, top : top + along, left : left + across] = clip[0, 0, 0] if rng.random() < 0.6 else rng.uniform(0, 255, 3)
    return made


FLAWS: tuple[Callable[[Clip, Clip, np.random.Generator], Clip], ...] = (
    _noisy,
    _half_denoised,
    _blurred,
    _blended,
    _spliced,
    _halved,
    _warped,
    _stretched,
    _frozen,
    _shuffled,
    _jumping,
    _flickering,
    _reversed,
    _patched,
)


def main() -> None:
    from diffusers import AutoencoderKLWan

    parser = arguments(__doc__, steps=0, batch_size=8, learning_rate=0.0)
    parser.add_argument("--vae", type=Path, default=Path("out/pack/vae"))
    parser.add_argument("--clips", type=int, default=1500)
    parser.add_argument("--split", default="train", choices=["train", "held_out"])
    options = parser.parse_args()
    device = set_up(options)
    vae = AutoencoderKLWan.from_pretrained(options.vae).to(device).eval()
    generated = Generated(Path(options.folder) / "generated") if options.split == "train" else None

    def make(part: int) -> dict[str, Any]:
        rng = stream(options.seed, 6_000_000 + (options.split == "held_out"), part)
        return decoded(vae, rng, PART, options.split, options.batch_size, generated)

    write_parts(Path(options.folder) / f"decoded-{options.split}", options, make)


@torch.no_grad()
def decoded(
    vae: Any, rng: np.random.Generator, count: int, split: Any, batch_size: int = 8, generated: Generated | None = None
) -> dict[str, np.ndarray]:
    """Clips out of the VAE, `frames` and, by the oracle, what each shows: every other batch of what the denoiser made, if
    there is any; of the others, half with damaged latents."""
    from models.pack.train.vae import encode, to_frames

    device = next(vae.parameters()).device
    frames: list[np.ndarray] = []
    scenes: list[Scene] = []
    for number in range(-(-count // batch_size)):
        if generated is not None and number % 2:
            chosen = rng.integers(len(generated.scenes), size=batch_size)
            some = [generated.scenes[at] for at in chosen]
            latents = torch.from_numpy(generated.latents[chosen].astype(np.float32))
        else:
            some = sample_scenes(rng, batch_size, split=split)
            clean = encode(vae, render(some, [int(seed) for seed in rng.integers(1 << 62, size=batch_size)]))
            latents = torch.stack(
                [damaged(one, clean[at - 1], rng) if rng.random() < 0.5 else one for at, one in enumerate(clean)]
            )
        frames.extend(to_frames(vae.decode(latents.to(device)).sample))
        scenes += some
    return packed(np.stack(frames[:count]), scenes[:count])


def damaged(latents: torch.Tensor, other: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Latents [C, T, 8, 8] as a poor denoiser might leave them."""
    way = rng.random()
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    if way < 0.4:  # noise left over
        share = float(rng.uniform(0.05, 0.6))
        return (1 - share) * latents + share * noise
    if way < 0.65:  # between two clips: half-formed figures
        share = float(rng.uniform(0.15, 0.85))
        return (1 - share) * latents + share * other
    if way < 0.85:  # noise in one place only
        mask = torch.zeros_like(latents[:1])
        top, left = rng.integers(0, 6, 2)
        mask[:, int(rng.integers(0, 3)) :, top : top + 3, left : left + 3] = float(rng.uniform(0.2, 0.9))
        return (1 - mask) * latents + mask * noise
    return torch.from_numpy(latents.numpy()[:, rng.permutation(latents.shape[1])].copy())  # time in disorder


def packed(frames: np.ndarray, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Clips and what the oracle says of them, as arrays: `seen` is a prompt of what was read, empty where nothing was."""
    known = [seen_as(clip, scene) for clip, scene in zip(frames, scenes, strict=True)]
    return {
        "frames": frames,
        "scenes": np.asarray([describe(scene) for scene in scenes]),
        "seen": np.asarray([describe(one.reading.scene) if one.reading.scene else "" for one in known]),
        "clean": np.asarray([one.clean for one in known]),
        "smooth": np.asarray([one.smooth for one in known]),
    }


class Decoded:
    """All decoded clips of a folder, in memory."""

    def __init__(self, folder: Path) -> None:
        parts = read_parts(folder)
        self.frames = [clip for part in parts for clip in part["frames"]]
        self.seen = [
            Seen(Reading(parse(str(seen)) if seen else None), bool(clean), bool(smooth), scene_of(str(scene)))
            for part in parts
            for scene, seen, clean, smooth in zip(
                part["scenes"], part["seen"], part["clean"], part["smooth"], strict=True
            )
        ]


if __name__ == "__main__":
    main()
