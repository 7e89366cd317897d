"""What can be wrong with a clip: what decoders, codecs and noise do to it, and things that are no clips of the world."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from infra.media import decode, encode
from models.pack.world import FPS, FRAME, NUM_FRAMES

Flaw = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def blurred(sigma: float) -> Flaw:
    def apply(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        import cv2

        return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])

    return apply


def noisy(sd: float) -> Flaw:
    return lambda clip, rng: _bytes(clip + rng.normal(0, sd, clip.shape))


def x264(crf: int) -> Flaw:
    def apply(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        media = encode(clip, FPS, crf=crf)
        return decode(media.data, media.suffix)

    return apply


def jpeg(quality: int) -> Flaw:
    def apply(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        import cv2

        made = [cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for frame in clip]
        return np.stack([cv2.imdecode(each, cv2.IMREAD_COLOR)[..., ::-1] for each in made])

    return apply


def tinted(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another gain and offset for each channel."""
    return _bytes(clip * rng.uniform(0.94, 1.06, 3) + rng.uniform(-8, 8, 3))


def smeared(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each frame with a sixth of the one before."""
    before = np.concatenate([clip[:1], clip[:-1]])
    return _bytes(clip * (5 / 6) + before * (1 / 6))


def decoded(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Roughly what a small video VAE does: soft edges, a tint, a little noise and smearing."""
    return noisy(4)(tinted(blurred(0.8)(smeared(clip, rng), rng), rng), rng)


MILD: dict[str, Flaw] = {
    "as rendered": lambda clip, rng: clip,
    "blur 0.7": blurred(0.7),
    "blur 1.0": blurred(1.0),
    "noise 6": noisy(6),
    "jpeg 75": jpeg(75),
    "x264 crf 23": x264(23),
    "tint": tinted,
    "smear": smeared,
    "like a decoder": decoded,
}
"""What a clip may go through and still be read."""


def noise_clips(rng: np.random.Generator, n: int) -> np.ndarray:
    """Noise of many kinds: each clip of another contrast, coarseness, colour and stillness. uint8 [n, T, 64, 64, 3]."""
    import cv2

    clips = np.empty((n, NUM_FRAMES, FRAME, FRAME, 3), dtype=np.uint8)
    for at in range(n):
        cells = int(rng.choice([4, 8, 16, 32, 64]))
        frames = 1 if rng.random() < 0.3 else NUM_FRAMES
        channels = 1 if rng.random() < 0.3 else 3
        coarse = rng.normal(0, rng.uniform(25, 100), (frames, cells, cells, channels)) + rng.uniform(0, 255, 3)
        fine = np.stack([cv2.resize(frame, (FRAME, FRAME), interpolation=cv2.INTER_LINEAR) for frame in coarse])
        clips[at] = _bytes(np.broadcast_to(fine, clips[at].shape))
    return clips


def blank_clips(rng: np.random.Generator, n: int, colours: np.ndarray) -> np.ndarray:
    """One colour from edge to edge, half of them of `colours` [k, 3], a third of them with a little noise."""
    clips = np.empty((n, NUM_FRAMES, FRAME, FRAME, 3), dtype=np.uint8)
    for at in range(n):
        colour = rng.choice(colours) if rng.random() < 0.5 else rng.uniform(0, 255, 3)
        clips[at] = _bytes(colour + rng.normal(0, 6 if rng.random() < 1 / 3 else 0, clips[at].shape))
    return clips


def blends(rng: np.random.Generator, clips: np.ndarray) -> np.ndarray:
    """Each clip mixed with the next, with 30% to 70% of it."""
    share = rng.uniform(0.3, 0.7, (len(clips), 1, 1, 1, 1)).astype(np.float32)
    return _bytes(share * clips + (1 - share) * np.roll(clips, -1, axis=0))
