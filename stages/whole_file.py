"""Placeholder for probing, cutting, reading and cropping: any file that PyAV reads, as one shot without bars.

It stands in for stages/probe.py, cut.py, clip.py and crop.py, whose names and arguments it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Literal

import numpy as np

from stages.batch import SampleError

Method = Literal["adaptive", "content", "hash"]


@dataclass(frozen=True, slots=True)
class Limits:
    bytes: int = 1 << 34
    pixels: int = 1 << 26
    seconds: float = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Probe:
    kind: Literal["video", "image"]
    codec: str
    width: int
    height: int
    rotation: int
    mirrored: bool
    frames: int
    seconds: float
    fps: str
    keyframes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CutDetector:
    method: Method = "adaptive"
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    start: float
    end: float
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Box:
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Wanted:
    fps: float | None = None
    num_frames: int | None = None
    box: Box | None = None
    shape: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    data: bytes
    codec: str
    start: float
    end: float


def probe(file: BinaryIO, limits: Limits) -> Probe:
    import av

    nbytes = file.seek(0, 2)
    file.seek(0)
    if not nbytes:
        raise SampleError("empty_file", "0 bytes")
    if nbytes > limits.bytes:
        raise SampleError("too_large", f"{nbytes} bytes > {limits.bytes}")
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise SampleError("no_video", "sound alone")
            stream = container.streams.video[0]
            width, height, codec = stream.codec_context.width, stream.codec_context.height, stream.codec_context.name
            base = float(stream.time_base or 1)
            shown = sorted(packet.pts for packet in container.demux(stream) if packet.size and packet.pts is not None)
    except av.FFmpegError as error:
        raise SampleError("not_media", " ".join(str(error).split())[:200]) from error
    if len(shown) < 2:
        return Probe("image", codec, width, height, 0, False, 1, 0.0, "", ())
    step = float(np.median(np.diff(shown))) * base
    seconds = (shown[-1] - shown[0]) * base + step
    if seconds > limits.seconds:
        raise SampleError("too_large", f"{seconds:.1f} seconds > {limits.seconds:g}")
    fps = str(Fraction(len(shown) / seconds).limit_denominator(1001))
    return Probe("video", codec, width, height, 0, False, len(shown), seconds, fps, ())


def cuts(file: BinaryIO, detector: CutDetector) -> list[float]:
    return []


def pieces(
    cuts: Sequence[float], seconds: float, shortest: float, longest: float, keyframes: Sequence[float] = ()
) -> list[Piece]:
    if seconds < shortest:
        return [Piece(0.0, seconds, f"too_short: {seconds:.3f} s < {shortest:g}")]
    count = math.ceil(seconds / longest - 1e-9)
    return [Piece(seconds * at / count, seconds * (at + 1) / count) for at in range(count)]


def glance(file: BinaryIO, start: float, end: float, count: int = 8) -> np.ndarray:
    return read(file, start, end, Wanted(fps=count / max(end - start, 1e-3)))[:count]


def picture(frames: np.ndarray) -> Box:
    height, width = frames.shape[1:3]
    return Box(0, 0, height // 2 * 2, width // 2 * 2)


def remux(file: BinaryIO, start: float, end: float) -> Cut | None:
    return None


def read(file: BinaryIO, start: float, end: float, wanted: Wanted) -> np.ndarray:
    import av
    import cv2

    file.seek(0)
    found: list[np.ndarray] = []
    try:
        with av.open(file) as container:
            stream = container.streams.video[0]
            base, origin = float(stream.time_base or 1), stream.start_time or 0
            rate = wanted.fps or float(stream.average_rate or 25)
            shown: np.ndarray | None = None
            for frame in container.decode(stream):
                at = float((frame.pts or 0) - origin) * base
                while shown is not None and start + len(found) / rate < min(at, end) - 0.002:
                    found.append(shown)
                if at >= end - 0.002:
                    break
                shown = frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise SampleError("corrupt", " ".join(str(error).split())[:200]) from error
    if shown is None:
        raise SampleError("corrupt", "not one frame decodes")
    while not found or start + len(found) / rate < end - 0.002:
        found.append(shown)
    found = found[: wanted.num_frames]
    if wanted.num_frames is not None and len(found) < wanted.num_frames:
        raise SampleError("too_short", f"{len(found)} of {wanted.num_frames} frames")
    if wanted.box is not None:
        box = wanted.box
        found = [pixels[box.top : box.top + box.height, box.left : box.left + box.width] for pixels in found]
    if wanted.shape is not None:
        size = wanted.shape[1], wanted.shape[0]
        found = [cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) for pixels in found]
    return np.stack(found)
