"""Media bytes: frames to mp4, png or webp and back. The same frames give the same bytes on every run and machine type.

Video is H.264 in mp4 with the index in front, so that a browser plays it before it has all of it. x264 runs with one
thread, because its bytes change with the thread count, and with `cpu-independent`, because it otherwise picks
algorithms by what the processor has. Colours are BT.709, limited range, and tagged so.

Files say in XMP that a trained model made them: IPTC's DigitalSourceType, which search engines, social networks and laws on
synthetic media look for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.container import OutputContainer
    from PIL.Image import Image

PRESET = "medium"
WEBP_QUALITY = 95
STRIP_QUALITY = 80
MARK = "trainedAlgorithmicMedia"
"""Of IPTC's vocabulary of digital source types: made by a model that was trained on examples."""
BT709 = 1
LIMITED_RANGE = 1


@dataclass(frozen=True, slots=True)
class Encoded:
    """One media file: its bytes, file suffix (no dot), mime type, and what encoded it with which settings."""

    data: bytes
    suffix: str
    mime: str
    codec: str


def encode(frames: np.ndarray, fps: float, image_format: str = "png", crf: int = 18, *, marked: bool = True) -> Encoded:
    """`frames` [T, H, W, 3] uint8 as one file: an image where T is 1, else an mp4 at `fps`; `marked` as made by a model.

    Raises ValueError where the frames are of another shape or dtype, or a video's height or width is odd (4:2:0 chroma
    has no half pixels, and padding would give a file that is not of the size its row says).
    """
    _check(frames)
    if len(frames) == 1:
        made = _encode_image(frames[0], image_format, marked)
    else:
        made = _encode_video(frames, fps, crf)
        made = replace(made, data=made.data + _uuid_box(_xmp())) if marked else made
    return replace(made, codec=f"{made.codec} xmp={MARK}") if marked else made


def _xmp() -> bytes:
    """An XMP packet (ISO 16684-1) with IPTC's property."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
        "<Iptc4xmpExt:DigitalSourceType>"
        f"http://cv.iptc.org/newscodes/digitalsourcetype/{MARK}"
        "</Iptc4xmpExt:DigitalSourceType>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _uuid_box(xmp: bytes) -> bytes:
    """An mp4 box of XMP (XMP specification, part 3), to be appended: no offset in the file changes."""
    content = bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + xmp
    return (8 + len(content)).to_bytes(4, "big") + b"uuid" + content


def decode(data: bytes, suffix: str) -> np.ndarray:
    """The frames [T, H, W, 3] uint8 in a file that `encode` made. Raises ValueError for a suffix it does not know."""
    if suffix in ("png", "webp"):
        from PIL import Image as Pillow

        with Pillow.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))[None].copy()
    if suffix != "mp4":
        raise ValueError(f"media suffix: expected mp4, png or webp, found {suffix!r}")
    import av

    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def decode_at(data: bytes, suffix: str, positions: np.ndarray) -> np.ndarray:
    """Some frames [k, H, W, 3] uint8 of a file, by their numbers, rising: no others are in memory. ValueError where there
    are fewer."""
    if suffix != "mp4":
        return decode(data, suffix)[positions]
    import av

    wanted, found = set(positions.tolist()), []
    with av.open(io.BytesIO(data)) as container:
        for at, frame in enumerate(container.decode(video=0)):
            if at in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise ValueError(f"frames: expected more than {int(positions[-1])}, found fewer")
    return np.stack(found)


def preview_strip(frames: np.ndarray, n: int = 4, height: int = 96) -> Encoded:
    """At most `n` evenly spaced frames of `frames` [T, H, W, 3] uint8, the first and last among them, as one webp.

    They lie side by side, `height` pixels high or less where the frames are. `split_strip` takes them apart.
    """
    from PIL import Image as Pillow

    _check(frames)
    evenly = np.linspace(0, len(frames) - 1, min(n, len(frames))).round().astype(int)
    shown = [Pillow.fromarray(frame) for frame in frames[evenly]]
    height = min(height, frames.shape[1])
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    strip = Pillow.new("RGB", (width * len(shown), height))
    for at, image in enumerate(shown):
        strip.paste(image.resize((width, height), Pillow.Resampling.BICUBIC), (at * width, 0))
    settings = {"quality": STRIP_QUALITY, "method": 4}
    return Encoded(
        _saved(strip, "webp", settings), "webp", "image/webp", _image_codec("webp", settings, f"strip={len(shown)}")
    )


def split_strip(data: bytes, num_frames: int, n: int = 4) -> np.ndarray:
    """The frames [min(n, num_frames), h, w, 3] uint8 of a preview strip of a sample of `num_frames` frames."""
    strip = decode(data, "webp")[0]
    return np.stack(np.split(strip, min(n, num_frames), axis=1))


def _check(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames: expected uint8 [T, H, W, 3], found {frames.dtype} {list(frames.shape)}")


def _encode_image(frame: np.ndarray, image_format: str, marked: bool) -> Encoded:
    from PIL import Image as Pillow
    from PIL.PngImagePlugin import PngInfo

    if image_format not in ("png", "webp"):
        raise ValueError(f"image format: expected png or webp, found {image_format!r}")
    settings = {"compress_level": 6} if image_format == "png" else {"quality": WEBP_QUALITY, "method": 4}
    mark: dict[str, Any] = {}
    if marked and image_format == "webp":
        mark["xmp"] = _xmp()
    elif marked:
        mark["pnginfo"] = PngInfo()
        mark["pnginfo"].add_itxt("XML:com.adobe.xmp", _xmp().decode())
    data = _saved(Pillow.fromarray(frame), image_format, settings | mark)
    return Encoded(data, image_format, f"image/{image_format}", _image_codec(image_format, settings))


def _saved(image: Image, image_format: str, settings: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **settings)
    return buffer.getvalue()


def _image_codec(image_format: str, settings: dict[str, int], *more: str) -> str:
    said = [f"{key}={value}" for key, value in settings.items()]
    return " ".join([image_format, *said, *more, *_image_libraries(image_format)])


@cache
def _image_libraries(image_format: str) -> tuple[str, str]:
    from PIL import __version__, features

    library = {"png": "zlib", "webp": "webp"}[image_format]
    return f"pillow-{__version__}", f"{library}-{features.version(library)}"


def _encode_video(frames: np.ndarray, fps: float, crf: int) -> Encoded:
    from fractions import Fraction

    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"video size: expected even height and width, found {height}x{width}; choose a bucket of even sizes"
        )
    buffer = io.BytesIO()
    scaling = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    reformatter = VideoReformatter()
    with mp4_into(buffer) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": PRESET, "x264-params": "cpu-independent=1"}
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for at, pixels in enumerate(frames):
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=scaling,
                threads=1,
            )
            frame.pts = at
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = buffer.getvalue()
    return Encoded(data, "mp4", "video/mp4", f"h264 crf={crf} preset={PRESET} {_x264(data)} yuv420p bt709 threads=1")


def mp4_into(buffer: io.BytesIO) -> OutputContainer:
    """An mp4 that is written into `buffer`, with its index in front."""
    import av

    # To move the index there, ffmpeg reads back what it has written: io_open gives it the same bytes again.
    return av.open(buffer, "w", format="mp4", options={"movflags": "+faststart"}, io_open=lambda *_: _Reader(buffer))


def _x264(data: bytes) -> str:
    """The encoder's version, which x264 writes into its stream: libx264-165."""
    found = re.search(rb"x264 - core (\d+)", data)
    return f"libx264-{found[1].decode()}" if found else "libx264"


class _Reader:
    """A second, read-only position in a buffer that is being written."""

    def __init__(self, buffer: io.BytesIO) -> None:
        self._buffer = buffer
        self._at = 0

    def read(self, size: int) -> bytes:
        with self._buffer.getbuffer() as view:
            data = bytes(view[self._at : self._at + size])
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._buffer.getbuffer().nbytes}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """Nothing of its own to close."""
