"""ScoreTexture: what cheap statistics say of a picture's surface: flat, empty, dark, written over, or frozen for a while.

flatness and entropy are UltraFlux's (MultiAspect-4K-1M, tools/filtering_pipeline.py): the share of tiles of 240 pixels whose
variance of Sobel's gradient magnitude is below 800, and Shannon's entropy of luma.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from stages.batch import Batch, SampleError, column, jsons, load_json, size, texts

MEASURED = ("flatness", "entropy", "luminance", "text_area", "duplicate_frames", "frozen")
"""Names of the scores, in the order in which a row has them."""

TILE = 240
FLAT_VARIANCE = 800.0

LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""BT.709's weights of red, green and blue."""

TEXT_SIDE = 640
"""Frames are scaled down to this longer side before text is looked for: a line of 2 % of it has 13 rows."""
STROKES = (9, 17, 25)
"""Strokes that are looked for, by the width in pixels within which one must end; gaps of as much are bridged."""
CONTRAST = 64
"""Levels between a stroke and what is beside it, at least."""
TWO_TONED = 0.8
"""Least share of the variance of a line's contrasts that lies between strokes and ground (Otsu's criterion): it is 0.64 for a
normal distribution, 0.75 for a uniform one."""
INKED = (0.15, 0.95)
"""Share of a line's box that its strokes fill."""
LINE_HEIGHT = (6, 0.2)
"""Rows of a line at least, and share of the frame's height at most."""
LINE_LENGTH = 2.0
"""Width over height of a line, at least."""
CROSSED = 1.0
"""Strokes that a row across a line crosses for each of its heights, at least; letters have about two."""

REFINED = (6, 0.1)
"""Levels at most, of one value and on average, by which two equal frames differ: a codec goes on to refine a picture that
stands still. A keyframe may change it by more, and then ends a run."""


@dataclass(frozen=True)
class ScoreTexture:
    """Scores frames and rejects by bounds, as ScoreMedia does and after it; a bound of None rejects nothing.

    Reads frames [n, T, H, W, 3] uint8. Adds to `scores` what `measure_texture` returns; where a bound is missed, also to
    `reasons`, and `verdict` becomes rejected.
    """

    max_flatness: float | None = None
    min_entropy: float | None = None
    min_luminance: float | None = None
    max_luminance: float | None = None
    max_text_area: float | None = None
    max_duplicate_frames: float | None = None
    max_frozen: float | None = None

    name: ClassVar[str] = "texture"
    reads: ClassVar[tuple[str, ...]] = ("frames", "scores", "verdict", "reasons")
    adds: ClassVar[tuple[str, ...]] = ("scores", "verdict", "reasons")
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import cv2

        cv2.setNumThreads(1)

    def __call__(self, batch: Batch) -> Batch:
        self.load()
        n = size(batch)
        error_type, error = column(batch, "error_type"), column(batch, "error")
        scores, reasons = load_json(column(batch, "scores")), load_json(column(batch, "reasons"))
        for row in range(n):
            try:
                measured = measure_texture(batch["frames"][row])
            except SampleError as fault:
                error_type[row], error[row] = fault.error_type, str(fault)
                continue
            scores[row] = scores[row] + [{"name": name, "value": value} for name, value in measured.items()]
            reasons[row] = reasons[row] + self.reasons(measured)
        verdicts = ["rejected" if why else "accepted" for why in reasons]
        return batch | {
            "error_type": error_type,
            "error": error,
            "scores": jsons(scores),
            "reasons": jsons(reasons),
            "verdict": texts(
                [verdict if not fault else "" for verdict, fault in zip(verdicts, error_type, strict=True)]
            ),
        }

    def reasons(self, measured: Mapping[str, float]) -> list[str]:
        """Why a sample with these scores is rejected; also of scores that were stored."""
        found = []
        for name in MEASURED:
            low, high = getattr(self, f"min_{name}", None), getattr(self, f"max_{name}", None)
            value = measured.get(name)
            if value is not None and low is not None and value < low:
                found.append(f"{name} {value:.4g} < {low:g}")
            if value is not None and high is not None and value > high:
                found.append(f"{name} {value:.4g} > {high:g}")
        return found


def measure_texture(frames: np.ndarray) -> dict[str, float]:
    """The scores of one sample's frames [T, H, W, 3] uint8, by name; the first four are means over the first, middle and last
    frame.

    flatness: share of flat tiles, 0-1. entropy: bits a pixel of luma, 0-8. luminance: BT.709's, 0-255. text_area: share of
    the frame within lines of text, see `text_lines`. Where T > 1, duplicate_frames: share of the frames after the first that
    are as the one before, and frozen: length of the longest run of equal frames as a share of the clip, 0 where no two are.
    Raises SampleError `score_failed` where frames are of another kind.
    """
    import cv2

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise SampleError(
            "score_failed", f"frames: expected uint8 [T, H, W, 3], found {frames.dtype} {list(frames.shape)}"
        )
    shown = [np.ascontiguousarray(frame) for frame in frames[sorted({0, len(frames) // 2, len(frames) - 1})]]
    luma = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in shown]
    scores = {
        "flatness": float(np.mean([_flatness(plane) for plane in luma])),
        "entropy": float(np.mean([_entropy(plane) for plane in luma])),
        "luminance": float(
            np.mean([frame.reshape(-1, 3).mean(axis=0, dtype=np.float64) @ LUMINANCE for frame in shown])
        ),
        "text_area": float(np.mean([_area(text_lines(plane), plane.shape) for plane in luma])),
    }
    if len(frames) > 1:
        scores |= _repeats(frames)
    return scores


def _flatness(luma: np.ndarray) -> float:
    """Tiles that the frame's edge cuts off count if at least half of one is there, in each direction, or none is whole."""
    import cv2

    across, along = (cv2.Sobel(luma, cv2.CV_32F, *which, ksize=3) for which in ((1, 0), (0, 1)))
    magnitude = np.sqrt(across * across + along * along)
    tiles = [
        magnitude[top:bottom, left:right]
        for top, bottom in _tiles(luma.shape[0])
        for left, right in _tiles(luma.shape[1])
    ]
    return float(np.mean([tile.var(dtype=np.float64) < FLAT_VARIANCE for tile in tiles]))


def _tiles(length: int) -> list[tuple[int, int]]:
    count = max(1, (length + TILE // 2) // TILE)
    return [(TILE * at, min(TILE * (at + 1), length) if at < count - 1 else length) for at in range(count)]


def _entropy(luma: np.ndarray) -> float:
    share = np.bincount(luma.ravel(), minlength=256) / luma.size
    share = share[share > 0]
    return float(abs((share * np.log2(share)).sum()))


def text_lines(luma: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, width, height) of what has the contrasts of lines of text in a frame uint8 [H, W].

    Strokes, which top-hat and black-hat transforms find by their width, lie side by side in a strip that is longer than high;
    there is little between stroke and ground; rows across it cross many. No letter is read: what looks like a line of text,
    such as a fence before the sky, is one, and writing that is hardly brighter than what is behind it is none.
    """
    import cv2

    scale = min(1.0, TEXT_SIDE / max(luma.shape))
    if scale < 1:
        luma = cv2.resize(luma, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    found = []
    for width in STROKES:
        stroke = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
        for bright_or_dark in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
            contrast = cv2.morphologyEx(luma, bright_or_dark, stroke)
            inked = (contrast >= CONTRAST).astype(np.uint8)
            closed = cv2.morphologyEx(inked, cv2.MORPH_CLOSE, np.ones((1, width), np.uint8))
            _, _, boxes, _ = cv2.connectedComponentsWithStats(closed, connectivity=4)
            for left, top, wide, tall in boxes[1:, :4].tolist():
                part = (slice(top, top + tall), slice(left, left + wide))
                if width <= 2 * tall and _is_line(contrast[part], inked[part], luma.shape[0]):
                    found.append((left, top, wide, tall))
    return [(round(left / scale), round(top / scale), round(w / scale), round(h / scale)) for left, top, w, h in found]


def _is_line(contrast: np.ndarray, inked: np.ndarray, frame_height: int) -> bool:
    height, width = inked.shape
    if not LINE_HEIGHT[0] <= height <= LINE_HEIGHT[1] * frame_height or width < LINE_LENGTH * height:
        return False
    if not INKED[0] <= inked.mean() <= INKED[1]:
        return False
    edges = np.abs(np.diff(inked.astype(np.int8), axis=1)).sum(axis=1)[height // 4 : height - height // 4]
    return bool(edges.mean() / 2 >= CROSSED * width / height) and _two_tones(contrast) >= TWO_TONED


def _two_tones(part: np.ndarray) -> float:
    """Otsu's criterion of separability, at its best threshold: 0 to 1."""
    share = np.bincount(part.ravel(), minlength=256) / part.size
    levels = np.arange(256)
    below, moment = np.cumsum(share), np.cumsum(share * levels)
    variance = float((share * (levels - moment[-1]) ** 2).sum())
    between = (moment[-1] * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return float(between[below < 1].max(initial=0.0)) / variance if variance else 0.0


def _area(boxes: list[tuple[int, int, int, int]], shape: tuple[int, ...]) -> float:
    covered = np.zeros(shape[:2], bool)
    for left, top, width, height in boxes:
        covered[top : top + height, left : left + width] = True
    return float(covered.mean())


def _repeats(frames: np.ndarray) -> dict[str, float]:
    import cv2

    equal = []
    for before, after in pairwise(frames):
        changed = cv2.absdiff(np.ascontiguousarray(before), np.ascontiguousarray(after))
        equal.append(bool(changed.max() <= REFINED[0] and changed.mean() <= REFINED[1]))
    longest = run = 0
    for same in equal:
        run = run + 1 if same else 0
        longest = max(longest, run)
    return {
        "duplicate_frames": float(np.mean(equal)),
        "frozen": (longest + 1) / len(frames) if longest else 0.0,
    }
