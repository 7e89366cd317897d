"""Where one shot ends and the next begins, by PySceneDetect's detectors, and the pieces that a corpus is made of.

The detectors are fed frame by frame from PyAV, not from a second decoder, so that whatever can be probed can be cut: 10 bits,
alpha, variable rates. They count frames; the seconds of a cut are the frame's own timestamp.

Thresholds are the field's: adaptive 3.0 (Open-Sora), content 27 and 15 frames (Panda-70M), hash 0.35 (PySceneDetect).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stages.footage import Source, frames_from, open_image, open_video, opened

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Method = Literal["adaptive", "content", "hash"]
THRESHOLDS: dict[Method, float] = {"adaptive": 3.0, "content": 27.0, "hash": 0.35}
WIDTH = 256
"""Frames are scaled to this width before they are compared, as PySceneDetect does by itself."""


@dataclass(frozen=True, slots=True)
class CutDetector:
    """Which detector, with which threshold (None: the field's), and how many frames lie between two cuts at least."""

    method: Method = "adaptive"
    threshold: float | None = None
    min_frames: int = 15

    def __call__(self, frames: Iterable[tuple[float, np.ndarray]]) -> list[float]:
        """Seconds at which a shot begins, rising, the first shot's left out.

        `frames` are (seconds, pixels uint8 [H, W, 3] in the order blue, green, red), all of one size; a few are in memory.
        """
        from scenedetect.common import FrameTimecode

        detector, seconds = self._detector(), []
        cuts: list[int] = []
        for at, (second, pixels) in enumerate(frames):
            seconds.append(second)
            cuts += [found.frame_num for found in detector.process_frame(FrameTimecode(at, 1.0), pixels)]
        if seconds:
            cuts += [found.frame_num for found in detector.post_process(FrameTimecode(len(seconds) - 1, 1.0))]
        return [seconds[cut] for cut in sorted(set(cuts)) if cut]

    def _detector(self) -> Any:
        from scenedetect.detectors import AdaptiveDetector, ContentDetector, HashDetector

        threshold = THRESHOLDS[self.method] if self.threshold is None else self.threshold
        if self.method == "adaptive":
            return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=self.min_frames)
        if self.method == "content":
            return ContentDetector(threshold=threshold, min_scene_len=self.min_frames)
        return HashDetector(threshold=threshold, min_scene_len=self.min_frames)


def cuts(source: Source, detector: CutDetector, threads: int = 1) -> list[float]:
    """Seconds at which shots of a video begin, rising, the first shot's left out; of an image none. All frames are decoded.

    Raises SampleError as `stages.footage.open_video` and `frames_from` do.
    """
    import cv2

    cv2.setNumThreads(1)
    with opened(source) as file:
        if open_image(file) is not None:
            return []
        with open_video(file, threads) as (container, stream):
            return detector(_small(frames_from(container, stream)))


def _small(frames: Iterator[tuple[float, VideoFrame]]) -> Iterator[tuple[float, np.ndarray]]:
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter = VideoReformatter()
    scaling = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    shape: tuple[int, int] | None = None
    for seconds, frame in frames:
        if shape is None:
            scale = min(1.0, WIDTH / frame.width)
            shape = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        made = reformatter.reformat(frame, *shape, format="bgr24", interpolation=scaling, threads=1)
        yield seconds, made.to_ndarray()


@dataclass(frozen=True, slots=True)
class Piece:
    """Seconds of a source, `end` excluded; `reason` says why it is left out, None where it is not."""

    start: float
    end: float
    reason: str | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


def pieces(
    cuts: Sequence[float],
    seconds: float,
    shortest: float = 2.0,
    longest: float = 10.0,
    keyframes: Sequence[float] = (),
) -> list[Piece]:
    """The shots of a source of so many seconds, in order: those below `shortest` with a reason, those above `longest` split
    evenly into as few pieces as do.

    A split within a shot moves to a keyframe where all pieces keep to both bounds, so that they can be cut out without
    re-encoding. Pieces tile the source. Raises ValueError unless 0 < 2 `shortest` <= `longest`: some lengths have no split
    otherwise.
    """
    if not 0 < 2 * shortest <= longest:
        raise ValueError(f"expected 0 < 2 x shortest <= longest, found {shortest:g} and {longest:g}")
    inner = sorted({cut for cut in cuts if 0 < cut < seconds})
    found: list[Piece] = []
    for start, end in zip([0.0, *inner], [*inner, float(seconds)], strict=True):
        if end - start < shortest:
            if end > start:
                found.append(Piece(start, end, f"too_short: {end - start:.3f} s < {shortest:g}"))
        else:
            found += _split(start, end, shortest, longest, keyframes)
    return found


def _split(start: float, end: float, shortest: float, longest: float, keyframes: Sequence[float]) -> Iterator[Piece]:
    for left in range(math.ceil((end - start) / longest), 1, -1):
        even = start + (end - start) / left
        # What this piece may end at so that it and the left - 1 after it keep to the bounds.
        low = max(start + shortest, end - (left - 1) * longest)
        high = min(start + longest, end - (left - 1) * shortest)
        at = _nearest(keyframes, even)
        stop = at if at is not None and low <= at <= high else even
        yield Piece(start, stop)
        start = stop
    yield Piece(start, end)


def _nearest(keyframes: Sequence[float], at: float) -> float | None:
    place = bisect_left(keyframes, at)
    return min(keyframes[max(0, place - 1) : place + 1], key=lambda key: abs(key - at), default=None)
