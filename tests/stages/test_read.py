from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from infra.media import encode
from infra.shard import build_tar, safetensors_bytes
from infra.storage import Storage
from stages.actor import run_stage
from stages.batch import Batch, texts
from stages.read import DecodeStored, ReadMedia

SHAPE = (5, 32, 48)


class Halve:
    """In the decoder's place: frames from latents, so that the test needs no model."""

    name = "decode"
    reads, adds = ("latents",), ("frames",)
    skips_rejected = False

    def __call__(self, batch: Batch) -> Batch:
        frames = np.repeat((batch["latents"] / 2).astype(np.uint8)[..., None], 3, axis=-1)
        return {**batch, "frames": frames}


def clips(count: int) -> np.ndarray:
    """Smooth clips, each of another brightness, that come back from an encoder nearly as they were."""
    ramp = np.linspace(0, 60, SHAPE[2]).astype(np.uint8)
    return np.stack([np.broadcast_to(ramp[:, None] + 40 * at, (*SHAPE, 3)) for at in range(1, count + 1)])


def write(storage: Storage, members: list[tuple[str, bytes, str]]) -> list[dict[str, Any]]:
    """A shard of (name, data, mime) and the references to it, as rows have them."""
    data, places = build_tar([(name, content) for name, content, _ in members])
    storage.write_bytes("media/run/0.tar", data)
    return [
        {
            "shard": "media/run/0.tar",
            "member": name,
            "offset": places[name][0],
            "nbytes": places[name][1],
            "mime": mime,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        for name, content, mime in members
    ]


def batch_of(sources: list[dict[str, Any]], shape: tuple[int, int, int] = SHAPE) -> Batch:
    columns: Batch = {
        "source": texts([json.dumps(source) for source in sources]),
        "error_type": texts([""] * len(sources)),
        "error": texts([""] * len(sources)),
        "error_stage": texts([""] * len(sources)),
    }
    for name, value in zip(("num_frames", "height", "width"), shape, strict=True):
        columns[name] = np.full(len(sources), value, np.int64)
    return columns


def test_read_gives_the_frames_of_stored_videos(storage):
    frames = clips(3)
    sources = write(storage, [(f"{at}.mp4", encode(clip, 8.0).data, "video/mp4") for at, clip in enumerate(frames)])
    read = ReadMedia(storage)(batch_of(sources))
    assert read["frames"].shape == frames.shape
    assert read["frames"].dtype == np.uint8
    assert np.abs(read["frames"].astype(int) - frames).mean() < 3
    assert list(read["error_type"]) == [""] * 3


def test_read_gives_the_pixels_of_stored_images(storage):
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 48, 3), dtype=np.uint8)
    sources = write(storage, [(f"{at}.png", encode(clip, 8.0).data, "image/png") for at, clip in enumerate(frames)])
    assert np.array_equal(ReadMedia(storage)(batch_of(sources, (1, 32, 48)))["frames"], frames)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_read_decodes_stored_latents(storage, dtype):
    latents = (np.arange(2 * 5 * 32 * 48).reshape(2, *SHAPE) % 64 * 2).astype(np.float32)
    members = [
        (f"{at}.safetensors", safetensors_bytes("latents", one, dtype, {}), "") for at, one in enumerate(latents)
    ]
    sources = [source | {"dtype": dtype, "shape": list(SHAPE)} for source in write(storage, members)]
    read = ReadMedia(storage)(batch_of(sources))
    assert np.array_equal(read["latents"], latents)
    decoded, _ = run_stage(DecodeStored(Halve()), read)
    assert np.array_equal(decoded["frames"][..., 0], latents / 2)


def test_what_has_frames_is_not_decoded(tmp_path):
    storage = Storage(str(tmp_path))
    sources = write(storage, [("a.mp4", encode(clips(1)[0], 8.0).data, "video/mp4")])
    read = ReadMedia(storage)(batch_of(sources))
    assert run_stage(DecodeStored(Halve()), read) == (read, 0.0)


def test_members_of_a_batch_are_asked_for_at_once(storage, monkeypatch):
    asked = []
    monkeypatch.setattr(Storage, "read_bytes", lambda *_: pytest.fail("a member was read by itself"))
    ranges = Storage.read_ranges
    monkeypatch.setattr(Storage, "read_ranges", lambda self, places: asked.append(len(places)) or ranges(self, places))
    sources = write(storage, [(f"{at}.mp4", encode(clip, 8.0).data, "video/mp4") for at, clip in enumerate(clips(3))])
    assert list(ReadMedia(storage)(batch_of(sources))["error_type"]) == [""] * 3
    assert asked == [3]


def test_read_fails_the_sample_that_is_to_blame_and_no_other(storage):
    data = encode(clips(1)[0], 8.0).data
    names = ("a.mp4", "changed.mp4", "broken.mp4", "short.mp4", "z.mp4")
    still = encode(clips(1)[0, :3], 8.0).data
    contents = {"broken.mp4": b"no video at all" * 40, "short.mp4": still}
    sources = write(storage, [(name, contents.get(name, data), "video/mp4") for name in names])
    shard = bytearray(storage.read_bytes("media/run/0.tar"))
    shard[sources[1]["offset"] + 100] ^= 1
    storage.write_bytes("media/run/0.tar", bytes(shard))
    gone = sources[0] | {"shard": "media/run/gone.tar"}
    beyond = sources[0] | {"offset": 10**8}
    read = ReadMedia(storage)(batch_of([*sources, gone, beyond]))
    assert list(read["error_type"]) == [
        "",
        "stored_media_changed",
        "stored_media_broken",
        "stored_media_broken",
        "",
        "stored_media_missing",
        "stored_media_changed",
    ]
    assert np.array_equal(read["frames"][0], read["frames"][4])
    assert read["frames"][0].any()
    assert "expected [5, 32, 48, 3], found [3, 32, 48, 3]" in read["error"][3]
    assert "media/run/gone.tar" in read["error"][5]


def test_read_of_nothing_sound_has_the_right_shape(tmp_path):
    source = {"shard": "gone", "member": "a", "offset": 0, "nbytes": 1, "mime": "video/mp4", "sha256": ""}
    read = ReadMedia(Storage(str(tmp_path)))(batch_of([source, source]))
    assert list(read["error_type"]) == ["stored_media_missing"] * 2
    assert read["frames"].shape == (2, *SHAPE, 3)


def test_read_lets_trouble_with_the_storage_through(tmp_path, monkeypatch):
    def down(*_):
        raise ConnectionResetError("storage is down")

    storage = Storage(str(tmp_path))
    sources = write(storage, [("a.mp4", encode(clips(1)[0], 8.0).data, "video/mp4")])
    monkeypatch.setattr(Storage, "read_bytes", down)
    monkeypatch.setattr(Storage, "read_ranges", down)
    with pytest.raises(OSError, match="storage is down"):
        ReadMedia(storage)(batch_of(sources))
