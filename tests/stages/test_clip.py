from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import fsspec
import numpy as np
import pytest

from stages.batch import SampleError
from stages.clip import Wanted, read, remux
from stages.crop import Box
from stages.probe import probe


def numbered(count: int) -> np.ndarray:
    """Frames of one grey each that says the frame's number: 3 levels apart."""
    return np.stack([np.full((64, 96, 3), 3 * at + 4, np.uint8) for at in range(count)])


def numbers(frames: np.ndarray) -> list[int]:
    return ((frames.mean(axis=(1, 2, 3)) - 4) / 3).round().astype(int).tolist()


def packets(source: Any) -> list[bytes]:
    with av.open(source) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


LOSSLESS = {"options": {"qp": "0"}, "pixel_format": "yuv444p"}


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize(
    ("start", "end", "first", "last"), [(0.0, 1.0, 0, 23), (0.75, 1.5, 18, 35), (1.99, 2.51, 48, 59)]
)
def test_own_frames_of_a_piece_begin_and_end_where_it_does(
    name: str, start: float, end: float, first: int, last: int, footage: Any
) -> None:
    made = footage.video(name, numbered(60), **LOSSLESS)
    assert numbers(read(made, start, end)) == list(range(first, last + 1))


@pytest.mark.parametrize(
    ("name", "made_as"),
    [
        ("open_group.mp4", {"options": {"qp": "0", "x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3"}}),
        ("one_group.mkv", {"gop": 999, **LOSSLESS}),
        ("a.flv", {"options": {"qp": "0"}}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "crf": "10"}}),
        ("a.avi", {"codec": "mpeg4", "options": {"b": "8000000"}}),
        ("a.mpg", {"codec": "mpeg2video", "rate": 25, "options": {"b": "8000000"}}),
    ],
)
def test_a_piece_is_found_in_whatever_can_be_probed(name: str, made_as: dict[str, Any], footage: Any) -> None:
    made = footage.video(name, numbered(60), **made_as)
    rate = made_as.get("rate", 24)
    for first in (12, 17, 31):
        assert numbers(read(made, first / rate, (first + 9) / rate)) == list(range(first, first + 9))


@pytest.mark.parametrize(
    ("fps", "count", "expected"),
    [
        (8, 6, [12, 15, 18, 21, 24, 27]),
        (24, 4, [12, 13, 14, 15]),
        (48, 6, [12, 12, 13, 13, 14, 14]),
        (10, 5, [12, 14, 16, 19, 21]),
        (None, 5, [12, 13, 14, 15, 16]),
    ],
)
def test_frames_at_a_rate_are_those_shown_then(
    fps: float | None, count: int, expected: list[int], footage: Any
) -> None:
    made = footage.video("a.mp4", numbered(60), **LOSSLESS)
    assert numbers(read(made, 0.5, 2.0, Wanted(fps=fps, num_frames=count))) == expected


def test_as_many_frames_as_a_piece_has_are_made_where_none_are_counted(footage: Any) -> None:
    made = footage.video("a.mp4", numbered(60), **LOSSLESS)
    assert len(read(made, 0.0, 2.0, Wanted(fps=8))) == 16
    assert len(read(made, 0.0, 2.5, Wanted(fps=24))) == 60


@pytest.mark.parametrize(("end", "wanted"), [(1.0, Wanted(fps=8, num_frames=9)), (9.0, Wanted(fps=8, num_frames=21))])
def test_a_piece_without_enough_frames_fails(end: float, wanted: Wanted, footage: Any) -> None:
    made = footage.video("a.mp4", numbered(60), **LOSSLESS)
    with pytest.raises(SampleError, match="frames at 8 fps in") as caught:
        read(made, 0.0, end, wanted)
    assert caught.value.error_type == "too_short"


def test_a_box_is_cut_out_and_a_shape_is_covered(footage: Any) -> None:
    frames = footage.frames(12)
    made = footage.video("a.mov", frames, codec="png", pixel_format="rgb24")
    box = Box(8, 16, 40, 60)
    assert np.array_equal(read(made, 0, 0.5, Wanted(box=box)), frames[:, 8:48, 16:76])
    assert read(made, 0, 0.5, Wanted(box=box, shape=(32, 32))).shape == (12, 32, 32, 3)
    # 64 x 96 covers 32 x 32 at a half: 32 x 48, of which the middle 32 columns are kept.
    halved = frames[:, :, 16:80].reshape(12, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(read(made, 0, 0.5, Wanted(shape=(32, 32))) - halved).max() <= 1


def test_a_file_object_is_read_as_a_path_is(footage: Any) -> None:
    made = footage.video("a.mp4", footage.frames(24))
    file = io.BytesIO(made.read_bytes())
    assert np.array_equal(read(file, 0, 1), read(made, 0, 1))
    assert np.array_equal(read(file, 0, 1), read(made, 0, 1)), "and once more"
    with fsspec.open(f"file://{made}", "rb") as opened:
        assert np.array_equal(read(opened, 0, 1), read(made, 0, 1))
        assert probe(opened) == probe(made)
        assert remux(opened, 0, 1) == remux(made, 0, 1)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("pictures", ["0", "2"])
def test_a_remuxed_piece_has_the_sources_own_bits(name: str, pictures: str, footage: Any) -> None:
    made = footage.video(name, numbered(72), options={"bf": pictures, "qp": "0", "sc_threshold": "0"})
    cut = remux(made, 1.0, 2.0)
    assert cut is not None and cut.codec == "h264"
    assert (cut.start, cut.end) == (pytest.approx(1.0), pytest.approx(2.0, abs=0.002))
    found = probe(io.BytesIO(cut.data))
    assert (found.frames, found.seconds) == (24, pytest.approx(1.0, abs=0.002))
    assert float(Fraction(found.fps)) == pytest.approx(24, abs=0.05), "Matroska's milliseconds"
    assert np.array_equal(read(io.BytesIO(cut.data), 0, 1), read(made, 1.0, 2.0))
    own = packets(str(made))
    if name != "a.ts":  # which has start codes where mp4 has lengths
        assert packets(io.BytesIO(cut.data)) == own[24:48]
    assert remux(made, 1.0, 2.0) == cut, "the same bytes again"


def test_a_remuxed_piece_shows_nothing_of_what_is_beside_it(footage: Any) -> None:
    made = footage.video("a.mp4", numbered(60), gop=30, options={"bf": "2", "qp": "0", "sc_threshold": "0"})
    for end in np.arange(1.5, 2.45, 1 / 24):
        cut = remux(made, 1.25, float(end))
        assert cut is not None
        shown = numbers(read(io.BytesIO(cut.data), 0, 2))
        assert shown == list(range(30, 30 + len(shown)))
        assert end - 0.25 <= (30 + len(shown)) / 24 <= end + 0.002
        assert cut.end == pytest.approx((30 + len(shown)) / 24, abs=0.002)


@pytest.mark.parametrize(
    ("start", "end", "made_as"),
    [
        (0.6, 2.0, {}),
        (0.9, 2.0, {"gop": 48}),
        (0.0, 2.0, {"codec": "ffv1", "name": "a.mkv"}),
        (0.0, 9.0, {}),
    ],
)
def test_a_piece_that_cannot_be_remuxed_is_none(
    start: float, end: float, made_as: dict[str, Any], footage: Any
) -> None:
    name = made_as.pop("name", "a.mp4") if made_as else "a.mp4"
    made = footage.video(name, numbered(60), **({"gop": 48, "options": {"sc_threshold": "0"}} | made_as))
    assert remux(made, start, end) is None


def test_a_remuxed_piece_is_turned_as_its_source_and_silent_unless_asked(footage: Any) -> None:
    made = footage.video("a.mp4", footage.frames(48), rotate=90, sound=True)
    silent, loud = remux(made, 0.5, 1.5), remux(made, 0.5, 1.5, audio=True)
    assert silent is not None and loud is not None
    for cut, has_audio in ((silent, False), (loud, True)):
        found = probe(io.BytesIO(cut.data))
        assert (found.rotation, found.width, found.height, found.has_audio) == (90, 64, 96, has_audio)
        assert np.array_equal(read(io.BytesIO(cut.data), 0, 1), read(made, 0.5, 1.5))


def test_an_image_is_not_remuxed(footage: Any) -> None:
    assert remux(footage.image("a.png", footage.frames(1)[0]), 0, 1) is None
