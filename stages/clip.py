"""A piece of a source as frames at a wanted rate, and as the source's own bytes where they can be cut without re-encoding."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.media import mp4_into
from stages.batch import SampleError
from stages.crop import Box
from stages.footage import (
    BLACK,
    Source,
    faults,
    frames_from,
    open_image,
    open_video,
    opened,
    over,
    rgb,
    sought,
    whole_image,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

EARLY = 0.002
"""Seconds by which a timestamp may be early or late and still be the one meant: containers round to milliseconds."""
REMUXED = ("h264", "hevc", "av1", "vp9", "mpeg4")
"""Video codecs that go into mp4 as they are."""
REMUXED_AUDIO = ("aac", "mp3", "opus", "ac3", "eac3", "flac", "alac")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What frames are made of a piece.

    `fps` None keeps the source's own frames; `num_frames` None takes as many as the piece has. `box` is cut out of a picture
    as it is shown, then `shape` (height, width) is covered by it and the rest cut off evenly.
    """

    fps: float | None = None
    num_frames: int | None = None
    box: Box | None = None
    shape: tuple[int, int] | None = None
    background: tuple[int, int, int] = BLACK
    """Under pixels that are transparent."""


@dataclass(frozen=True, slots=True)
class Cut:
    """An mp4 of a source's own packets, and which seconds of the source it shows."""

    data: bytes
    codec: str
    start: float
    end: float


def read(source: Source, start: float, end: float, wanted: Wanted | None = None, threads: int = 1) -> np.ndarray:
    """The frames uint8 [T, H, W, 3] of a source that are shown from `start` up to and without `end` (seconds), turned as its
    display matrix or EXIF says.

    Frame k at a rate is the one shown at start + k / fps by the timestamps, so that a variable rate comes out even; a source
    of a lower rate repeats frames. An image is one frame, whatever the seconds. Memory is that of the frames that are kept.

    Raises SampleError `too_short` where the piece has not `num_frames` frames, and as `open_video` and `frames_from` do.
    """
    wanted = wanted or Wanted()
    with opened(source) as file:
        if open_image(file) is not None:
            frames = [_fitted(_image_pixels(whole_image(file), wanted.background), wanted)]
        else:
            with open_video(file, threads) as (container, stream):
                taken = _taken(frames_from(container, stream, start), start, end, wanted)
                frames = list(islice(taken, wanted.num_frames))
    count = wanted.num_frames
    if not frames or (count is not None and len(frames) < count):
        rate = "" if wanted.fps is None else f" at {wanted.fps:g} fps"
        raise SampleError("too_short", f"{len(frames)} of {count or 1} frames{rate} in {start:.3f} to {end:.3f} s")
    return np.stack(frames)


def glance(source: Source, start: float, end: float, count: int = 8, threads: int = 1) -> np.ndarray:
    """At most `count` frames [T, H, W, 3] uint8 of a piece, evenly spaced: what borders are looked for in."""
    fps = count / max(end - start, 1e-3)
    return read(source, start, end, Wanted(fps=fps), threads)[:count]


def _taken(
    frames: Iterator[tuple[float, VideoFrame]], start: float, end: float, wanted: Wanted
) -> Iterator[np.ndarray]:
    if wanted.fps is not None:
        yield from _sampled(frames, start, end, wanted.fps, wanted)
        return
    for seconds, frame in frames:
        if seconds >= end - EARLY:
            return
        if seconds >= start - EARLY:
            yield _shown(frame, wanted)


def _sampled(
    frames: Iterator[tuple[float, VideoFrame]], start: float, end: float, fps: float, wanted: Wanted
) -> Iterator[np.ndarray]:
    made, shown = 0, None
    for seconds, frame in _and_its_end(frames):
        pixels = None
        while shown is not None and start + made / fps < min(seconds, end) - EARLY:
            pixels = _shown(shown, wanted) if pixels is None else pixels
            yield pixels
            made += 1
        if seconds >= end - EARLY:
            return
        shown = frame


def _and_its_end(frames: Iterator[tuple[float, VideoFrame]]) -> Iterator[tuple[float, VideoFrame | None]]:
    """The frames, and then None at the second at which the last of them is shown no more."""
    last, step, length = -math.inf, 0.0, 0.0
    for seconds, frame in frames:
        step, last = seconds - last if math.isfinite(last) else 0.0, seconds
        length = float(frame.duration * frame.time_base) if frame.duration else 0.0
        yield seconds, frame
    yield last + max(step, length), None


def _shown(frame: VideoFrame, wanted: Wanted) -> np.ndarray:
    return _fitted(rgb(frame, wanted.background), wanted)


def _fitted(pixels: np.ndarray, wanted: Wanted) -> np.ndarray:
    import cv2

    if wanted.box is not None:
        pixels = pixels[wanted.box.rows, wanted.box.columns]
    if wanted.shape is None or pixels.shape[:2] == wanted.shape:
        return np.ascontiguousarray(pixels)
    height, width = wanted.shape
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    tall, wide = (max(least, round(side * scale)) for least, side in zip(wanted.shape, pixels.shape, strict=False))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    pixels = cv2.resize(np.ascontiguousarray(pixels), (wide, tall), interpolation=way)
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _image_pixels(image: Image, background: tuple[int, int, int]) -> np.ndarray:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip it
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return over(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")), background)


def remux(source: Source, start: float, end: float, tolerance: float = 0.25, audio: bool = False) -> Cut | None:
    """The piece as an mp4 of the source's packets, bit for bit; it shows nothing outside of `start` and `end`.

    None where that cannot be: the codec has no place in mp4, or no keyframe is within `tolerance` seconds after `start`, or
    the frames that can be decoded by themselves end more than that before `end`. `audio` keeps the first sound stream if it
    goes into mp4. The same source gives the same bytes with one version of ffmpeg.

    Raises SampleError as `open_video` does, and `corrupt` where packets cannot be read.
    """
    with opened(source) as file:
        if open_image(file) is not None:
            return None
        with open_video(file) as (container, stream), faults(f"cutting at {start:.3f} s"):
            if stream.codec_context.codec.canonical_name not in REMUXED:
                return None
            sound = next(iter(container.streams.audio), None) if audio else None
            if sound is not None and sound.codec_context.codec.canonical_name not in REMUXED_AUDIO:
                sound = None
            video, heard = _packets(container, stream, sound, start, end)
            if not video:
                return None
            first, last = _seconds(stream, video[0].pts), max(_shown_until(stream, packet) for packet in video)
            if first > start + tolerance or last < end - tolerance:
                return None
            return Cut(_muxed(stream, video, sound, heard), stream.codec_context.name, first, min(last, end))


def _packets(
    container: InputContainer, stream: VideoStream, sound: Stream | None, start: float, end: float
) -> tuple[list[Packet], list[Packet]]:
    """The packets of the video from the first keyframe at `start` or after it that decode by themselves and are all shown
    before `end`: in decoding order a frame needs none that follows. And those of the sound between the same seconds."""
    sought(container, stream, start)
    video: list[Packet] = []
    heard: list[Packet] = []
    done = False
    for packet in container.demux(*(found for found in (stream, sound) if found is not None)):
        if not packet.size or packet.pts is None or packet.dts is None or packet.is_discard:
            continue
        at = _seconds(stream, packet.pts * packet.time_base / stream.time_base)
        if packet.stream.index != stream.index:
            if start - EARLY <= at < end - EARLY:
                heard.append(packet)
        elif not done and (video or (packet.is_keyframe and at >= start - EARLY)):
            done = at >= end - EARLY
            # A picture that leads an open group is shown before its keyframe, and refers to what is not here.
            if not done and (not video or packet.pts >= video[0].pts):
                video.append(packet)
        if done and (sound is None or at >= end + 1):
            break
    return video, heard


def _seconds(stream: VideoStream, pts: Any) -> float:
    return float((pts - (stream.start_time or 0)) * stream.time_base)


def _shown_until(stream: VideoStream, packet: Packet) -> float:
    length = packet.duration or round(1 / (stream.time_base * (stream.average_rate or Fraction(25))))
    return _seconds(stream, packet.pts + length)


def _muxed(stream: VideoStream, video: list[Packet], sound: Stream | None, heard: list[Packet]) -> bytes:
    origin = video[0].pts * stream.time_base
    buffer = io.BytesIO()
    with mp4_into(buffer) as made:
        copies = {stream.index: made.add_stream_from_template(stream, opaque=True)}
        if sound is not None and heard:
            copies[sound.index] = made.add_stream_from_template(sound)
        for packet in sorted([*video, *heard], key=lambda found: found.dts * found.time_base):
            shift = round(origin / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = copies[packet.stream.index]
            made.mux_one(packet)
    return buffer.getvalue()
