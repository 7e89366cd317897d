"""Footage: media files of any origin, opened without trust, and read a frame at a time.

ffmpeg reads more than media: playlists and lists that name other files and addresses, subtitles, text as pictures. Only the
demuxers of DEMUXERS are let near a file, none of which follows a name, so that a file can bring in nothing but itself.

Seconds are those since the stream's start time, so that 0 is the first frame that a player shows.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from stages.batch import SampleError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image

Source = str | Path | BinaryIO
"""A local path, or a binary file that can be read and sought, such as fsspec opens."""

DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf,ivf,nut,gif,rm,wav,mp3,flac,aac,amr,aiff"
)
IMAGES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")
"""Formats that Pillow reads; of an animated one the first picture. A GIF is a video."""

BLACK = (0, 0, 0)
HD_HEIGHT = 720
"""From this height on, untagged colours are BT.709, below it BT.601: what players take them for."""
BT601, BT709, UNSPECIFIED = 5, 1, 2


SCALING = ("BICUBIC", "FULL_CHR_H_INT", "ACCURATE_RND", "BITEXACT")
"""Of swscale, whose short cut for chroma makes greys up to two levels darker than they are."""


def opened(source: Source) -> AbstractContextManager[BinaryIO]:
    """The source as a file at its beginning; a path is closed again, a file is its owner's."""
    if isinstance(source, (str, Path)):
        return Path(source).open("rb")
    source.seek(0)
    return nullcontext(source)


def length(file: BinaryIO) -> int:
    """Bytes of a file, left at its beginning."""
    end = file.seek(0, 2)
    file.seek(0)
    return end


@contextmanager
def faults(doing: str) -> Iterator[None]:
    """What ffmpeg cannot make sense of is the file's own fault: SampleError `corrupt`. What reading raises, as of storage
    that is down, and a lack of memory are not."""
    import av.error

    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise SampleError("corrupt", f"{doing}: {error.strerror or error}") from error


@contextmanager
def open_video(file: BinaryIO, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A container and its first video stream that is no cover picture.

    Raises SampleError: `not_media`, `truncated` or `corrupt` where its header cannot be read, `no_video` where it has sound
    only, `no_decoder` where nobody here knows its codec.
    """
    import av
    import av.error

    file.seek(0)
    try:
        container = av.open(file, options={"format_whitelist": DEMUXERS}, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise _unreadable(file) from error
    with container:
        if not container.streams:
            raise SampleError("corrupt", f"{container.format.name} without a single stream")
        stream = next((found for found in container.streams.video if not _is_cover(found)), None)
        if stream is None:
            kinds = ", ".join(sorted({found.type for found in container.streams}))
            raise SampleError("no_video", f"{container.format.name} with {kinds} alone")
        if stream.codec_context is None:
            raise SampleError("no_decoder", f"{container.format.name}: no decoder for its video")
        stream.codec_context.thread_count = threads
        yield container, stream


def open_image(file: BinaryIO) -> Image | None:
    """An image whose header is read and whose pixels are not; None where it is none.

    Raises SampleError `too_large` where Pillow takes it for a decompression bomb, `corrupt` where its header makes no sense.
    """
    import warnings

    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)
        try:
            return Pillow.open(file, formats=IMAGES)
        except UnidentifiedImageError:
            file.seek(0)
            return None
        except Pillow.DecompressionBombError as error:
            raise SampleError("too_large", str(error)) from error
        except (SyntaxError, OSError) as error:  # so Pillow's plugins call it
            if getattr(error, "errno", None) is not None or type(error) not in (SyntaxError, OSError):
                raise
            promised = promised_bytes(file) or 0
            kind = "truncated" if promised > length(file) else "corrupt"
            raise SampleError(kind, f"image header: {error}") from error


def whole_image(file: BinaryIO) -> Image:
    """The image that a file holds, decoded. Raises SampleError `truncated` or `corrupt`."""
    from PIL import Image as Pillow

    file.seek(0)
    data = io.BytesIO(file.read())
    try:
        image = Pillow.open(data, formats=IMAGES)
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's plugins has errors of its own
        kind = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise SampleError(kind, f"image: {type(error).__name__}: {error}") from error
    return image


def frames_from(
    container: InputContainer, stream: VideoStream, start: float = 0.0
) -> Iterator[tuple[float, VideoFrame]]:
    """(seconds, frame) in the order in which they are shown, from the last frame at or before `start`, or earlier.

    Raises SampleError `corrupt` at a frame that does not decode or that the decoder had to make up.
    """
    if start > 0 and sought(container, stream, start):
        frames = _decoded(container, stream)
        try:
            first = next(frames, None)
        except SampleError:  # an index that leads nowhere
            first = None
        if first is not None and first[0] <= start:
            yield first
            yield from frames
            return
        with faults("going back to the first frame"):
            container.seek(stream.start_time or 0, stream=stream)
    yield from _decoded(container, stream)


def sought(container: InputContainer, stream: VideoStream, seconds: float) -> bool:
    """Whether the container went to the keyframe before; one that cannot is where it was."""
    import av.error

    try:
        container.seek(int(seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
    except av.error.FFmpegError:
        return False
    return True


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, VideoFrame]]:
    step = float(1 / (stream.average_rate or 25))
    origin, seconds = stream.start_time or 0, -step
    frames = container.decode(stream)
    while True:
        with faults(f"decoding after {max(seconds, 0):.3f} s"):
            frame = next(frames, None)
        if frame is None:
            return
        seconds = seconds + step if frame.pts is None else float((frame.pts - origin) * frame.time_base)
        if frame.is_corrupt:
            raise SampleError("corrupt", f"the frame at {seconds:.3f} s is damaged")
        yield seconds, frame


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """(transposed, rows reversed, columns reversed) of what a player makes of a frame, by its display matrix."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def turned(pixels: np.ndarray, transposed: bool, rows: bool, columns: bool) -> np.ndarray:
    """Pixels [H, W, C] as they are shown."""
    pixels = pixels.swapaxes(0, 1) if transposed else pixels
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def rgb(
    frame: VideoFrame, background: tuple[int, int, int] = BLACK, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a frame as it is shown, scaled to `shape` (height, width) where given.

    More than 8 bits are rounded to 8; HDR is not tone-mapped. Alpha is straight, over `background`.
    """
    from av.video.reformatter import Interpolation

    transposed, rows, columns = orientation(frame)
    height, width = (shape[::-1] if transposed else shape) if shape else (frame.height, frame.width)
    tagged = frame.colorspace not in (UNSPECIFIED, 0)
    made = frame.reformat(
        width=width,
        height=height,
        format="rgba" if has_alpha(frame) else "rgb24",
        src_colorspace=None if tagged else (BT709 if frame.height >= HD_HEIGHT else BT601),
        interpolation=reduce(or_, (Interpolation[name] for name in SCALING)),
        threads=1,
    )
    return np.ascontiguousarray(over(turned(made.to_ndarray(), transposed, rows, columns), background))


def over(pixels: np.ndarray, background: tuple[int, int, int] = BLACK) -> np.ndarray:
    """Pixels uint8 [H, W, 4] with straight alpha laid over a colour: uint8 [H, W, 3]; with three channels, as they are."""
    if pixels.shape[-1] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    below = np.asarray(background, np.uint16) * (255 - alpha)
    return ((pixels[..., :3] * alpha + below + 127) // 255).astype(np.uint8)


def has_alpha(frame: VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _is_cover(stream: VideoStream) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _unreadable(file: BinaryIO) -> SampleError:
    """Why a header could not be read: by the first bytes, and by how many bytes its outermost boxes promise."""
    size = length(file)
    promised = promised_bytes(file)
    if promised is None:
        return SampleError("not_media", "no image and no container of video that is known here")
    if promised > size:
        return SampleError("truncated", f"{size} bytes of {promised}")
    return SampleError("corrupt", "its header cannot be read")


def promised_bytes(file: BinaryIO) -> int | None:
    """How long a file says that it is, as far as its kind tells: ISO boxes (mp4, mov), EBML (mkv, webm), RIFF (avi, wav).

    At most what is there where the kind says no size; None where the kind is none of these. Reads headers of boxes only.
    """
    size = length(file)
    head = file.read(12)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _ebml_end(file)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return _boxes_end(file, size)
    return None


def _boxes_end(file: BinaryIO, size: int) -> int:
    """End of the last box of ISO 14496-12; a byte more than is there where there is no index (moov) at all."""
    at, seen = 0, set()
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        long, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if long == 1:
            long = int.from_bytes(head[8:16], "big")
        elif long == 0:
            long = size - at
        seen.add(kind)
        if long < 8:
            return at
        at += long
    return at if b"moov" in seen else max(at, size + 1)


def _ebml_end(file: BinaryIO) -> int:
    """End of the first segment of Matroska; where it stands where the segment's size is unknown, as of a stream."""
    file.seek(4)
    file.seek(_vint(file)[0], 1)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    value, known = _vint(file)
    return file.tell() + value if known else 0


def _vint(file: BinaryIO) -> tuple[int, bool]:
    """A variable-length integer of EBML (RFC 8794, section 4), and whether it is known."""
    first = file.read(1)
    if not first or not first[0]:
        return 0, False
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(first + file.read(more), "big") & ((1 << bits) - 1)
    return value, value != (1 << bits) - 1
