"""One file of each kind of trouble, made here, and its documented outcome: the table of docs/curation.md, "Files"."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.batch import SampleError
from stages.clip import Wanted, read
from stages.cut import CutDetector, cuts
from stages.footage import DEMUXERS
from stages.probe import Limits, probe

BEFORE = [0, 40, 80, 200, 240, 400]
UNEVEN = BEFORE + [400 + 33 * step for step in range(1, 43)]
"""Milliseconds at which 48 frames of a phone's camera are shown."""


def cut_short(path: Path, share: float = 0.6) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged(path: Path, start: float, share: float = 0.15) -> Path:
    """The file with noise in its middle."""
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, int(len(data) * share), dtype=np.uint8)
    at = int(len(data) * start)
    data[at : at + len(noise)] = noise.tobytes()
    path.write_bytes(bytes(data))
    return path


def without_index(path: Path) -> Path:
    """The file with noise for what its index holds; the index is as long as before."""
    data = path.read_bytes()
    at = data.rindex(b"moov") + 4
    noise = np.random.default_rng(0).integers(0, 256, len(data) - at, dtype=np.uint8)
    path.write_bytes(data[:at] + noise.tobytes())
    return path


def renamed(path: Path) -> Path:
    """The file, whose codec is called by a name that is nobody's."""
    path.write_bytes(path.read_bytes().replace(b"avc1", b"qqqq"))
    return path


def written(footage: Any, name: str, data: bytes) -> Path:
    path = footage.folder / name
    path.write_bytes(data)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\1\0IDAT"


def fast(footage: Any) -> Path:
    return footage.video("fast.mp4", footage.frames(48), container={"movflags": "+faststart"})


REFUSED: dict[str, tuple[str, Callable[[Any], Path]]] = {
    "zero bytes": ("empty_file", lambda f: written(f, "none.mp4", b"")),
    "text": ("not_media", lambda f: written(f, "notes.mp4", b"no video, but words\n" * 99)),
    "text that ffmpeg would draw": ("not_media", lambda f: written(f, "notes.txt", b"words\n" * 99)),
    "a bare stream without a container": ("not_media", lambda f: f.video("a.h264", f.frames(48))),
    "sound alone": ("no_video", lambda f: f.sound("voice.m4a")),
    "sound alone, in wav": ("no_video", lambda f: f.sound("voice.wav", codec="pcm_s16le")),
    "mp4 without its index": ("truncated", lambda f: cut_short(f.video("a.mp4", f.frames(48)))),
    "mp4 with its index, half its pictures": ("truncated", lambda f: cut_short(fast(f))),
    "mkv cut short": ("truncated", lambda f: cut_short(f.video("a.mkv", f.frames(48)))),
    "avi cut short": ("truncated", lambda f: cut_short(f.video("a.avi", f.frames(48), codec="mpeg4"))),
    "png cut short": ("truncated", lambda f: cut_short(f.image("a.png", f.frames(1)[0]))),
    "jpeg cut short": ("truncated", lambda f: cut_short(f.image("a.jpg", f.frames(1)[0]))),
    "webp cut short": ("truncated", lambda f: cut_short(f.image("a.webp", f.frames(1)[0]))),
    "mp4 with noise where its first picture is": ("corrupt", lambda f: damaged(fast(f), 0.35)),
    "mkv with noise where packets begin": ("corrupt", lambda f: damaged(f.video("a.mkv", f.frames(96)), 0.3, 0.6)),
    "mp4 with noise for an index": ("corrupt", lambda f: without_index(f.video("a.mp4", f.frames(48)))),
    "mp4 of a codec that nobody knows": ("no_decoder", lambda f: renamed(f.video("a.mp4", f.frames(48)))),
    "png with noise in it": ("corrupt", lambda f: damaged(f.image("a.png", f.frames(1)[0]), 0.4)),
    "an image of 100 000 pixels a side": ("too_large", lambda f: written(f, "bomb.png", png_header(100_000, 100_000))),
    "an image of 10 000 pixels a side": ("too_large", lambda f: written(f, "large.png", png_header(10_000, 10_000))),
    "five hours by the header": ("too_large", lambda f: f.video("long.mkv", f.frames(2), pts=[0, 18_000_000])),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_probe_refuses(kind: str, footage: Any) -> None:
    error_type, make = REFUSED[kind]
    with pytest.raises(SampleError) as caught:
        probe(make(footage))
    assert caught.value.error_type == error_type
    assert str(caught.value)


def test_probe_refuses_a_playlist_before_it_reads_what_the_playlist_names(footage: Any) -> None:
    video = footage.video("other.mp4", footage.frames(24))
    lists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{video}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{video}'\n",
    }
    for name, text in lists.items():
        with pytest.raises(SampleError) as caught:
            probe(written(footage, name, text.encode()))
        assert caught.value.error_type == "not_media"
    assert "hls" not in DEMUXERS and "concat" not in DEMUXERS and "image2" not in DEMUXERS


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(bytes=1000), "bytes > 1000"),
        (Limits(pixels=6000), "96x64 = 6144 pixels > 6000"),
        (Limits(seconds=1.5), "2.0 seconds > 1.5"),
    ],
)
def test_probe_refuses_what_is_beyond_the_limits_given(limits: Limits, said: str, footage: Any) -> None:
    with pytest.raises(SampleError, match=said) as caught:
        probe(footage.video("a.mp4", footage.frames(48)), limits)
    assert caught.value.error_type == "too_large"


def test_probe_refuses_too_large_a_file_by_its_header_alone(footage: Any) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    data = fast(footage).read_bytes() + (1 << 24) * b"\0"
    file = Counting(data)
    with pytest.raises(SampleError, match="seconds"):
        probe(file, Limits(seconds=1.5))
    assert file.taken < 1 << 20


def test_storage_that_fails_is_no_fault_of_the_file(footage: Any) -> None:
    class Lost(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 1 << 16:
                raise ConnectionError("the bucket is gone")
            return super().read(size)

    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    with pytest.raises(ConnectionError, match="the bucket is gone"):
        probe(Lost(footage.video("large.mov", noise, codec="png", pixel_format="rgb24").read_bytes()))
    with pytest.raises(FileNotFoundError):
        probe(footage.folder / "nowhere.mp4")


def test_probe_of_a_plain_video(footage: Any) -> None:
    made = footage.video("a.mp4", footage.frames(48), sound=True)
    for source in (made, str(made), io.BytesIO(made.read_bytes())):
        found = probe(source)
        assert (found.kind, found.codec, found.pixel_format, found.bit_depth) == ("video", "h264", "yuv420p", 8)
        assert (found.width, found.height, found.rotation, found.mirrored) == (96, 64, 0, False)
        assert (found.frames, found.seconds, found.fps, found.variable_rate) == (48, 2.0, "24", False)
        assert (found.has_audio, found.has_alpha, found.hdr, found.pixel_aspect) == (True, False, False, "1")
        assert found.keyframes == (0.0, 0.5, 1.0, 1.5)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.mov"])
def test_probe_of_a_broken_rate_is_exact_whatever_the_container_rounds(name: str, footage: Any) -> None:
    found = probe(footage.video(name, footage.frames(24), rate=24000 / 1001))
    assert (found.fps, found.variable_rate, found.frames) == ("24000/1001", False, 24)
    assert found.seconds == pytest.approx(24 * 1001 / 24000, abs=0.002)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_rate_is_seen_and_comes_out_even(name: str, footage: Any) -> None:
    frames = np.stack([np.full((64, 96, 3), 5 * at, np.uint8) for at in range(48)])
    made = footage.video(name, frames, pts=UNEVEN)
    found = probe(made)
    assert found.variable_rate and found.frames == 48
    assert found.seconds == pytest.approx(UNEVEN[-1] / 1000 + 0.033, abs=0.01)
    shown = read(made, 0.0, found.seconds, Wanted(fps=25, num_frames=12)).mean(axis=(1, 2, 3)) / 5
    # At 0, 40, 80 ms the frames' own; from 80 to 200 the third stays; the fifth from 240 to 400.
    assert shown.round().astype(int).tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 4, 4, 5, 6]


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_a_rotated_video_is_shown_upright(rotate: int, hflip: bool, footage: Any) -> None:
    frames = footage.frames(12)
    made = footage.video("turned.mov", frames, codec="png", pixel_format="rgb24", rotate=rotate, hflip=hflip)
    shown = np.rot90(frames, rotate // 90, axes=(1, 2))
    shown = shown[:, :, ::-1] if hflip else shown
    found = probe(made)
    assert (found.height, found.width) == shown.shape[1:3]
    assert (found.rotation, found.mirrored) == (rotate, hflip)
    assert np.array_equal(read(made, 0, 1), shown)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_shown_as_its_exif_says(orientation: int, footage: Any) -> None:
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = footage.frames(1)[0]
    made = footage.image("a.png", pixels, exif=exif)
    with Image.open(made) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    found = probe(made)
    assert (found.kind, found.frames, found.seconds, found.fps) == ("image", 1, 0.0, "")
    assert (found.height, found.width) == shown.shape[:2]
    upright = np.rot90(pixels, found.rotation // 90)
    assert np.array_equal(shown, upright[:, ::-1] if found.mirrored else upright)
    assert np.array_equal(read(made, 0, 0), shown[None])


def test_ten_bits_become_eight_within_a_level(footage: Any) -> None:
    levels = np.arange(64, 941, 36)
    deep = np.full((len(levels), 96, 96), 512, np.uint16)
    deep[:, :64] = levels[:, None, None]
    made = footage.video("deep.mkv", deep, codec="ffv1", pixel_format="yuv420p10le")
    found = probe(made)
    assert (found.codec, found.bit_depth, found.pixel_format) == ("ffv1", 10, "yuv420p10le")
    expected = (levels - 64) / 876 * 255
    assert np.abs(read(made, 0, 2) - expected[:, None, None, None]).max() <= 1


def test_alpha_is_laid_over_a_colour(footage: Any) -> None:
    pixels = np.zeros((12, 64, 96, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (200, 100, 50), np.linspace(0, 255, 96).astype(np.uint8)
    made = footage.video("clear.mov", pixels, codec="png", pixel_format="rgba")
    assert probe(made).has_alpha
    alpha = pixels[..., 3:] / 255
    assert np.abs(read(made, 0, 0.5) - pixels[..., :3] * alpha).max() <= 1
    over_green = pixels[..., :3] * alpha + np.array([0, 255, 0]) * (1 - alpha)
    assert np.abs(read(made, 0, 0.5, Wanted(background=(0, 255, 0))) - over_green).max() <= 1
    image = footage.image("clear.png", pixels[0])
    assert probe(image).has_alpha
    assert np.array_equal(read(image, 0, 0), read(made, 0, 0.01))


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png", "a.bmp", "a.tiff"])
def test_an_image_file_is_one_frame(name: str, footage: Any) -> None:
    pixels = footage.frames(1)[0]
    made = footage.image(name, pixels)
    found = probe(made)
    assert (found.kind, found.frames, found.width, found.height) == ("image", 1, 96, 64)
    assert np.abs(read(made, 0, 0)[0].astype(int) - pixels).mean() < 6
    assert cuts(made, CutDetector()) == []


def test_sixteen_bits_of_an_image_become_eight(footage: Any) -> None:
    deep = (np.arange(256, dtype=np.uint16) * 256).reshape(16, 16)
    made = footage.image("deep.png", deep)
    assert probe(made).bit_depth == 16
    assert np.array_equal(read(made, 0, 0)[0, :, :, 0].ravel(), np.arange(256))


def test_a_gif_is_a_video(footage: Any) -> None:
    found = probe(footage.video("a.gif", footage.frames(10), rate=10, codec="gif", pixel_format="rgb8"))
    assert (found.kind, found.codec, found.frames, found.fps) == ("video", "gif", 10, "10")


def test_damage_behind_the_first_frame_shows_when_frames_are_decoded(footage: Any) -> None:
    made = damaged(footage.video("a.mp4", footage.frames(96), gop=96, container={"movflags": "+faststart"}), 0.7)
    assert probe(made).frames == 96
    with pytest.raises(SampleError) as caught:
        cuts(made, CutDetector("hash"))
    assert caught.value.error_type == "corrupt"
    with pytest.raises(SampleError) as caught:
        read(made, 1.0, 4.0)
    assert caught.value.error_type == "corrupt"
    assert len(read(made, 0.0, 0.5)) == 12, "what stands before the damage can be read"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.png", "a.webp"])
def test_whatever_is_damaged_the_file_is_at_fault_and_nothing_else_is_raised(name: str, footage: Any) -> None:
    still = name in ("a.png", "a.webp")
    frames = footage.frames(24)
    made = footage.image(name, frames[0]) if still else footage.video(name, frames, codec=codec_of(name))
    whole, random = made.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(12):
        data = np.frombuffer(whole, np.uint8).copy()
        at = int(random.integers(len(data)))
        span = data[at : at + int(random.integers(1, 64))]
        span[:] = random.integers(0, 256, len(span), dtype=np.uint8)
        file = io.BytesIO(data.tobytes()[: int(random.integers(len(data) // 2, 2 * len(data)))])
        try:
            probe(file)
            read(file, 0.0, 1.0)
            outcomes.add("")
        except SampleError as error:
            outcomes.add(error.error_type)
    assert outcomes <= {"", "truncated", "corrupt", "not_media", "no_decoder", "no_video", "too_large", "too_short"}
    assert len(outcomes) > 1


def codec_of(name: str) -> str:
    return "mpeg4" if name == "a.avi" else "libx264"


def test_the_docs_tell_the_outcome_of_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "curation.md").read_text(encoding="utf-8")
    assert [kind for kind, (error_type, _) in REFUSED.items() if f"| {kind} | `{error_type}` |" not in page] == []
