"""ScoreMedia: what can be said of a sample without a model, so that the judge is not asked about a black screen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from stages.batch import Batch, SampleError, column, jsons, load_json, size, texts

MEASURED = ("sharpness", "brightness", "motion", "flicker", "static")
"""Names of the scores, in the order in which a row has them; a judge's follow."""

FLOW_SIDE = 256
"""Frames are scaled so that the longer side is at most this before optical flow, whose cost goes with the area."""

FLOW_PAIRS = 8
"""Pairs of neighbouring frames, spread over the clip, of which optical flow is taken: a long clip costs no more."""

STILL = 2
"""Largest difference of luma (0-255) at which two pixels still count as equal: decoders round."""

HASH_BITS = 64

THUMB_SIDE = 16
THUMB_LEVELS = 16
"""Duplicates differ by at most this many levels (0-255) in every pixel and channel of their small copies."""


class _Seen(NamedTuple):
    """What tells an accepted sample from its duplicates."""

    sample_id: str
    digest: int
    thumbs: np.ndarray


@dataclass(frozen=True)
class ScoreMedia:
    """Scores frames and rejects by bounds; a bound of None rejects nothing. The bounds are those of the spec's `score`.

    Reads frames [n, T, H, W, 3] uint8. Adds to `scores`: sharpness, brightness and, where T > 1, motion, flicker and
    static (1 or 0); to `extra`: phash, 16 hex digits. Sets `verdict` and `reasons`. Luma is BT.601's, 0-255.

    Duplicates are looked for among the samples of one batch: the first that is not rejected stays. The hash, a DCT hash
    of the middle frame's luma, proposes them; it is blind to colour and to what moves, so small copies of the first,
    middle and last frame must agree too.
    """

    min_sharpness: float | None = None
    min_motion: float | None = None
    max_motion: float | None = None
    max_flicker: float | None = None
    min_brightness: float | None = None
    max_brightness: float | None = None
    reject_static: bool = True
    reject_duplicates: bool = True
    duplicate_distance: int = 0

    name: ClassVar[str] = "score"
    reads: ClassVar[tuple[str, ...]] = ("sample_id", "frames", "extra")
    adds: ClassVar[tuple[str, ...]] = ("scores", "verdict", "reasons", "extra")
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import cv2
        import imagehash  # noqa: F401

        cv2.setNumThreads(1)

    def __call__(self, batch: Batch) -> Batch:
        self.load()
        n = size(batch)
        out = dict(batch)
        error_type, error = column(batch, "error_type"), column(batch, "error")
        scores = load_json(column(batch, "scores"))
        reasons: list[list[str]] = [[] for _ in range(n)]
        extra = [json.loads(value) if value else {} for value in column(batch, "extra")]
        kept: list[_Seen] = []
        for row in range(n):
            try:
                frames = batch["frames"][row]
                measured = measure(frames)
            except SampleError as fault:
                error_type[row], error[row] = fault.error_type, str(fault)
                continue
            seen = _Seen(batch["sample_id"][row], perceptual_hash(frames), thumbnails(frames))
            scores[row] = scores[row] + [{"name": name, "value": value} for name, value in measured.items()]
            extra[row]["phash"] = f"{seen.digest:016x}"
            reasons[row] = self.reasons(measured)
            if self.reject_duplicates and not reasons[row]:
                reasons[row] = self._duplicates(seen, kept)
            if not reasons[row]:
                kept.append(seen)
        verdicts = ["rejected" if why else "accepted" for why in reasons]
        out["error_type"], out["error"] = error_type, error
        out["scores"], out["reasons"], out["extra"] = jsons(scores), jsons(reasons), jsons(extra)
        out["verdict"] = texts(
            [verdict if not fault else "" for verdict, fault in zip(verdicts, error_type, strict=True)]
        )
        return out

    def reasons(self, measured: Mapping[str, float]) -> list[str]:
        """Why a sample with these scores is rejected, duplicates apart; also of scores that were stored."""
        found = []
        for name, low, high in (
            ("sharpness", self.min_sharpness, None),
            ("brightness", self.min_brightness, self.max_brightness),
            ("motion", self.min_motion, self.max_motion),
            ("flicker", None, self.max_flicker),
        ):
            value = measured.get(name)
            if value is None:
                continue
            if low is not None and value < low:
                found.append(f"{name} {value:.4g} < {low:g}")
            if high is not None and value > high:
                found.append(f"{name} {value:.4g} > {high:g}")
        if self.reject_static and measured.get("static"):
            found.append("static: no frame differs from the first")
        return found

    def _duplicates(self, seen: _Seen, kept: list[_Seen]) -> list[str]:
        for other in kept:
            distance = (seen.digest ^ other.digest).bit_count()
            if distance <= self.duplicate_distance and np.abs(seen.thumbs - other.thumbs).max() <= THUMB_LEVELS:
                return [f"duplicate of {other.sample_id}: perceptual hashes differ in {distance} of {HASH_BITS} bits"]
        return []


def measure(frames: np.ndarray) -> dict[str, float]:
    """The scores of one sample's frames [T, H, W, 3] uint8, by name.

    sharpness: variance of the Laplacian of luma, mean over frames. brightness: mean luma. motion: mean Farneback flow
    magnitude over pixels and over 8 pairs of neighbouring frames, in pixels of the frame per frame. flicker: mean
    |m[t+1] - 2 m[t] + m[t-1]| of the mean luma m, so that a steady fade is none. static: 1 where no frame differs from
    the first.
    Raises SampleError `score_failed` where frames are of another kind or a score is not finite.
    """
    import cv2

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise SampleError(
            "score_failed", f"frames: expected uint8 [T, H, W, 3], found {frames.dtype} {list(frames.shape)}"
        )
    luma = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    means = np.array([cv2.mean(plane)[0] for plane in luma])
    scores = {
        "sharpness": float(np.mean([_variance(cv2.Laplacian(plane, cv2.CV_16S)) for plane in luma])),
        "brightness": float(means.mean()),
    }
    if len(luma) > 1:
        scores["motion"] = _motion(luma)
        scores["flicker"] = float(np.abs(np.diff(means, n=2)).mean()) if len(luma) > 2 else 0.0
        scores["static"] = float(not any(cv2.absdiff(luma[0], plane).max() > STILL for plane in luma[1:]))
    for name, value in scores.items():
        if not math.isfinite(value):
            raise SampleError("score_failed", f"{name}: expected a finite number, found {value}")
    return scores


def perceptual_hash(frames: np.ndarray) -> int:
    """The 64-bit DCT hash of the middle frame of `frames` [T, H, W, 3] uint8."""
    import imagehash
    from PIL import Image

    digest = imagehash.phash(Image.fromarray(frames[len(frames) // 2]), hash_size=8)
    return int(str(digest), 16)


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """The first, middle and last frame of `frames` [T, H, W, 3] uint8, small: [3, 16, 16, 3] int16."""
    import cv2

    shown = frames[[0, len(frames) // 2, -1]]
    return np.stack(
        [cv2.resize(frame, (THUMB_SIDE, THUMB_SIDE), interpolation=cv2.INTER_AREA) for frame in shown], dtype=np.int16
    )


def _variance(plane: np.ndarray) -> float:
    import cv2

    return float(cv2.meanStdDev(plane)[1][0, 0]) ** 2


def _motion(luma: list[np.ndarray]) -> float:
    import cv2

    height, width = luma[0].shape
    scale = min(1.0, FLOW_SIDE / max(height, width))
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    lengths = []
    for at in sorted(set(np.linspace(0, len(luma) - 2, FLOW_PAIRS).round().astype(int))):
        before, after = luma[at : at + 2]
        if scale < 1:
            before, after = (cv2.resize(plane, shape, interpolation=cv2.INTER_AREA) for plane in (before, after))
        flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        # In numpy: the last bits of cv2.magnitude and of cv2.mean of floats change with where the array lies in memory.
        across, along = flow[..., 0].astype(np.float64), flow[..., 1].astype(np.float64)
        lengths.append(np.sqrt(across * across + along * along).mean())
    return float(np.mean(lengths)) / scale
