from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from infra.media import decode, encode, preview_strip, split_strip

ENCODE_ELSEWHERE = """
import hashlib, os, sys
import numpy as np
from infra.media import encode
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
frames = np.load(sys.argv[1])
print(hashlib.sha256(encode(frames, 8.0).data).hexdigest())
"""


def clip(num_frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A green block that moves over a red ramp."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(60, 220, width).astype(np.uint8)
    for at in range(num_frames):
        frames[at, 8:24, 2 * at : 2 * at + 16] = (20, 200, 40)
    return frames


@pytest.mark.parametrize(("num_frames", "image_format"), [(9, "png"), (1, "png"), (1, "webp")])
def test_encode_repeats_its_bytes_in_this_and_in_another_process(tmp_path, num_frames, image_format):
    import hashlib

    frames = clip(num_frames, 256, 256)  # on a lower picture x264 takes one thread of itself
    once, again = encode(frames, 8.0, image_format), encode(frames.copy(), 8.0, image_format)
    assert once == again
    if image_format == "png":
        np.save(tmp_path / "frames.npy", frames)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "7"}
        command = [sys.executable, "-c", ENCODE_ELSEWHERE, str(tmp_path / "frames.npy")]
        elsewhere = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()
        assert elsewhere == hashlib.sha256(once.data).hexdigest()


def test_encode_video_is_what_players_and_trainers_expect():
    encoded = encode(clip(), 12.5, crf=20)
    assert (encoded.suffix, encoded.mime) == ("mp4", "video/mp4")
    assert encoded.data.index(b"moov") < encoded.data.index(b"mdat")
    with av.open(io.BytesIO(encoded.data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, float(stream.average_rate)) == (9, 12.5)
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)


def test_encode_says_what_encoded_with_which_settings():
    words = encode(clip(), 8.0, crf=23).codec.split()
    assert words[0] == "h264" and {"crf=23", "preset=medium", "threads=1"} <= set(words)
    assert (
        b" threads=1 lookahead_threads=1 " in encode(clip(9, 256, 256), 8.0).data
    )  # x264 writes its settings into the stream
    assert any(word.startswith("libx264-") and word[8:].isdigit() for word in words)
    assert encode(clip(1), 8.0, "webp").codec.startswith("webp quality=95")
    assert " zlib-" in encode(clip(1), 8.0, "png").codec


def test_encode_keeps_colours_through_the_right_matrix():
    # The wrong matrix or range moves a saturated colour by 10 levels or more; rounding twice moves it by 3 at most.
    for colour in ((200, 30, 60), (20, 220, 40), (30, 40, 230), (250, 250, 250), (5, 5, 5)):
        frames = np.full((3, 32, 32, 3), colour, np.uint8)
        assert np.abs(decode(encode(frames, 8.0).data, "mp4").astype(int) - frames).max() <= 3


def test_encode_crf_trades_size_for_fidelity():
    rng = np.random.default_rng(0)
    frames = np.clip(clip().astype(int) + rng.integers(-20, 20, (9, 48, 64, 3)), 0, 255).astype(np.uint8)
    fine, coarse = encode(frames, 8.0, crf=10), encode(frames, 8.0, crf=40)
    loss = [np.abs(decode(item.data, "mp4").astype(int) - frames).mean() for item in (fine, coarse)]
    assert len(fine.data) > 2 * len(coarse.data) and loss[0] < loss[1]


def test_decode_of_png_is_lossless_and_of_webp_close():
    frames = clip(1)
    np.testing.assert_array_equal(decode(encode(frames, 8.0, "png").data, "png"), frames)
    close = decode(encode(frames, 8.0, "webp").data, "webp")
    assert close.shape == frames.shape and np.abs(close.astype(int) - frames).mean() < 6


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((3, 31, 32, 3), np.uint8), "expected even height and width, found 31x32"),
        (np.zeros((3, 32, 31, 3), np.uint8), "expected even height and width, found 32x31"),
        (np.zeros((3, 32, 32, 3), np.float32), r"expected uint8 \[T, H, W, 3\], found float32 \[3, 32, 32, 3\]"),
        (np.zeros((32, 32, 3), np.uint8), r"found uint8 \[32, 32, 3\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"found uint8 \[0, 32, 32, 3\]"),
    ],
)
def test_encode_refuses_what_it_cannot_keep(frames, message):
    with pytest.raises(ValueError, match=message):
        encode(frames, 8.0)


def test_encode_takes_images_of_odd_size():
    assert decode(encode(np.zeros((1, 31, 33, 3), np.uint8), 8.0).data, "png").shape == (1, 31, 33, 3)


def test_decode_refuses_a_suffix_it_does_not_know():
    with pytest.raises(ValueError, match="expected mp4, png or webp, found 'gif'"):
        decode(b"", "gif")


@pytest.mark.parametrize(("num_frames", "shown"), [(9, [0, 3, 5, 8]), (3, [0, 1, 2]), (1, [0])])
def test_preview_strip_shows_evenly_spaced_frames(num_frames, shown):
    frames = np.stack([np.full((200, 320, 3), 20 * at, np.uint8) for at in range(num_frames)])
    strip = preview_strip(frames)
    found = split_strip(strip.data, num_frames)
    assert found.shape == (len(shown), 96, 154, 3) and strip.mime == "image/webp"
    assert [round(frame.mean() / 20) for frame in found] == shown
    assert len(strip.data) < 2_000


def test_preview_strip_does_not_enlarge():
    assert split_strip(preview_strip(clip()).data, 9).shape == (4, 48, 64, 3)


SOURCE = b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.parametrize(("num_frames", "image_format"), [(9, "png"), (1, "png"), (1, "webp")])
def test_a_file_says_that_a_model_made_it(num_frames, image_format):
    frames = clip(num_frames)
    marked, plain = encode(frames, 8.0, image_format), encode(frames, 8.0, image_format, marked=False)
    assert marked.data.count(SOURCE) == 1 and marked.codec == f"{plain.codec} xmp=trainedAlgorithmicMedia"
    assert SOURCE not in plain.data
    assert 0 < len(marked.data) - len(plain.data) < 700
    np.testing.assert_array_equal(decode(marked.data, marked.suffix), decode(plain.data, plain.suffix))


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_readers_of_xmp_find_the_mark_in_an_image(image_format):
    from xml.etree import ElementTree

    from PIL import Image

    with Image.open(io.BytesIO(encode(clip(1), 8.0, image_format).data)) as image:
        found = ElementTree.fromstring(image.info["xmp"])
    (said,) = found.iter("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert said.text.encode() == SOURCE


def test_a_video_ends_with_a_box_of_xmp():
    data, boxes, at = encode(clip(), 8.0).data, [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        boxes.append((data[at + 4 : at + 8], data[at + 8 : at + size]))
        at += size
    assert at == len(data)
    assert [kind for kind, _ in boxes] == [b"ftyp", b"moov", b"free", b"mdat", b"uuid"]
    assert boxes[-1][1][:16].hex() == "be7acfcb97a942e89c71999491e3afac"
