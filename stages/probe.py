"""What a media file is, before anything is computed on it: codec, size, length, rate, and whether it can be read at all."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np

from stages.batch import SampleError
from stages.footage import (
    Source,
    faults,
    frames_from,
    has_alpha,
    length,
    open_image,
    open_video,
    opened,
    orientation,
    promised_bytes,
    whole_image,
)

if TYPE_CHECKING:
    from PIL.Image import Image

EXIF_ORIENTATION = 0x0112
TURNED_IMAGES = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}
"""Degrees counterclockwise, by the value of EXIF's Orientation."""
DEEP_MODES = {"1": 1, "I;16": 16, "I;16B": 16, "I": 32, "F": 32}
"""Bits a channel of Pillow's modes, where they are not 8."""
HDR_TRANSFERS = (16, 18)
"""PQ (SMPTE ST 2084) and HLG (ARIB STD-B67), by ITU-T H.273."""

UNEVEN = 0.1
"""A rate is variable where a gap between frames differs from their median by more than this share of it."""
ROUNDING = 0.0011
"""And by more than so many seconds: Matroska's timestamps are whole milliseconds."""
MISSING = 0.05
"""A stream that ends before its header's duration by more than this share of it, and by more than a second, is damaged."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may be at most: bytes, pixels of a frame, seconds. All three are told by headers alone."""

    bytes: int = 1 << 34
    pixels: int = 1 << 26
    seconds: float = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Probe:
    """A file's facts. `width` and `height` are as shown, turned by `rotation`: degrees counterclockwise, 0, 90, 180 or 270.

    An image has one frame, 0 seconds and no fps; `codec` and `pixel_format` are then Pillow's names.
    """

    kind: Literal["video", "image"]
    container: str
    codec: str
    pixel_format: str
    bit_depth: int
    has_alpha: bool
    hdr: bool
    width: int
    height: int
    pixel_aspect: str
    """Width over height of a pixel as a fraction, "1" where it is square or not said. Nothing here stretches by it."""
    rotation: int
    mirrored: bool
    frames: int
    seconds: float
    """From the first frame shown to the end of the last."""
    fps: str
    """The average, as an exact fraction of timestamps: "24000/1001"."""
    variable_rate: bool
    has_audio: bool
    keyframes: tuple[float, ...]
    """Seconds of the frames at which a piece can begin without re-encoding, rising."""


def probe(source: Source, limits: Limits | None = None) -> Probe:
    """Reads a file's facts; `limits` of None are the default ones.

    One frame is decoded. Of a video all packets are read and none is kept but its time, 8 bytes a frame; what is too large is
    refused before that, by its header. An image is decoded whole.

    Raises SampleError, of which the docs have a table: `empty_file`, `not_media`, `no_video`, `no_decoder`, `truncated`,
    `corrupt`, `too_large`. Damage behind the first frame shows when frames are decoded, see `stages.footage.frames_from`.
    """
    limits = limits or Limits()
    with opened(source) as file:
        size = length(file)
        if not size:
            raise SampleError("empty_file", "0 bytes")
        if size > limits.bytes:
            raise SampleError("too_large", f"{size} bytes > {limits.bytes}")
        if (image := open_image(file)) is not None:
            return _image(image, file, limits)
        return _video(file, size, limits)


def _image(image: Image, file: BinaryIO, limits: Limits) -> Probe:
    width, height = image.size
    _refuse_pixels(width, height, limits)
    codec, mode = str(image.format).lower(), image.mode
    image = whole_image(file)
    turn = image.getexif().get(EXIF_ORIENTATION, 1)
    return Probe(
        kind="image",
        container=codec,
        codec=codec,
        pixel_format=mode,
        bit_depth=DEEP_MODES.get(mode, 8),
        has_alpha=image.has_transparency_data,
        hdr=False,
        width=height if turn in (5, 6, 7, 8) else width,
        height=width if turn in (5, 6, 7, 8) else height,
        pixel_aspect="1",
        rotation=TURNED_IMAGES.get(turn, 0),
        mirrored=turn in (2, 4, 5, 7),
        frames=1,
        seconds=0.0,
        fps="",
        variable_rate=False,
        has_audio=False,
        keyframes=(),
    )


def _video(file: BinaryIO, size: int, limits: Limits) -> Probe:
    promised = promised_bytes(file)
    with open_video(file) as (container, stream):
        context = stream.codec_context
        _refuse_pixels(context.width, context.height, limits)
        said = (container.duration or 0) / 1e6
        if said > limits.seconds:
            raise SampleError("too_large", f"{said:.1f} seconds > {limits.seconds:g}")
        if promised is not None and promised > size:
            raise SampleError("truncated", f"{size} bytes of {promised}")
        first = next(frames_from(container, stream), (0.0, None))[1]
        if first is None:
            raise SampleError("corrupt", "not one frame decodes")
        _refuse_pixels(first.width, first.height, limits)
        timing = _timing(file, said)
        transposed, rows, columns = orientation(first)
        return Probe(
            kind="video",
            container=container.format.name,
            codec=context.name,
            pixel_format=first.format.name,
            bit_depth=max(component.bits for component in first.format.components),
            has_alpha=has_alpha(first),
            hdr=first.color_trc in HDR_TRANSFERS,
            width=first.height if transposed else first.width,
            height=first.width if transposed else first.height,
            pixel_aspect=str(Fraction(stream.sample_aspect_ratio or 1)),
            rotation=_degrees(transposed, rows, columns),
            mirrored=(transposed + rows + columns) % 2 == 1,
            frames=timing.frames,
            seconds=timing.seconds,
            fps=timing.fps,
            variable_rate=timing.variable,
            has_audio=bool(container.streams.audio),
            keyframes=timing.keyframes,
        )


def _refuse_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise SampleError("too_large", f"{width}x{height} = {width * height} pixels > {limits.pixels}")


def _degrees(transposed: bool, rows: bool, columns: bool) -> int:
    """What is left of a mirrored picture's transformation once its columns are reversed, as of any other's."""
    if (transposed + rows + columns) % 2:
        columns = not columns
    return {(False, False): 0, (True, True): 90, (False, True): 180, (True, False): 270}[transposed, rows]


@dataclass(frozen=True, slots=True)
class _Timing:
    frames: int
    seconds: float
    fps: str
    variable: bool
    keyframes: tuple[float, ...]


def _timing(file: BinaryIO, said: float) -> _Timing:
    """Opens the file anew, as not every kind goes back, and reads its packets.

    Raises SampleError `corrupt` where one is damaged, or they end long before the seconds that the header `said`.
    """
    shown, keys = array("q"), array("q")
    ends, longest = 0.0, 0
    with open_video(file) as (container, stream), faults("reading packets"):
        origin, base = stream.start_time or 0, stream.time_base
        rate = stream.average_rate or Fraction(25)
        tick = round(1 / (base * rate))
        for packet in container.demux():
            if not packet.size or packet.is_discard:
                continue
            at = packet.dts if packet.pts is None else packet.pts
            if at is not None:
                ends = max(ends, float((at + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise SampleError("corrupt", f"packet {len(shown)} of the video is damaged")
            shown.append(len(shown) * tick if at is None else at)
            if packet.is_keyframe:
                keys.append(shown[-1])
            longest = packet.duration or 0
        ends -= (container.start_time or 0) / 1e6
    if said - ends > max(1.0, MISSING * said):
        raise SampleError("corrupt", f"it ends at {ends:.1f} s of {said:.1f}")
    if not shown:
        raise SampleError("corrupt", "not one packet of video")
    times = np.sort(np.asarray(shown, np.int64))
    gaps = np.diff(times)
    step = int(np.median(gaps)) if len(gaps) else longest or tick
    span = (int(times[-1] - times[0]) + (longest or step)) * base
    variable = bool((np.abs(gaps - step) > max(UNEVEN * step, ROUNDING / base)).any())
    if variable or not stream.average_rate:
        rate = Fraction(len(times)) / span
    return _Timing(
        frames=len(times),
        seconds=float(span),
        fps=str(Fraction(rate).limit_denominator(1001 * 1000)),
        variable=variable,
        keyframes=tuple(float((key - origin) * base) for key in sorted(keys)),
    )
