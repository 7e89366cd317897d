"""A sample's media as a report shows them: read from its shard, and made smaller where a page could not carry them."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.media import decode, encode
from infra.shard import outside
from infra.storage import Storage

SMALL = (256, 30)
LESS_SMALL = (384, 24)
"""What is too large for a page is shown as a smaller copy: its shorter side in pixels, and x264's quality."""

ROOMY = 250_000
"""From this share of the page on, a copy is less small."""

SUFFIXES = {"video/mp4": "mp4", "image/png": "png", "image/webp": "webp"}
"""What may be embedded. The media type comes from the dataset: another (HTML, SVG) must not reach the page."""


@dataclass(frozen=True)
class Media:
    """What a card shows. `kind` is video, image, strip (`frames` side by side) or none; `note` says why not
    more, if there ever was more."""

    kind: str
    uri: str = ""
    frames: int = 1
    note: str = ""


def show(storage: Storage, row: dict[str, Any], share: int) -> Media:
    """What can be shown of a row of `samples` in about `share` characters of a page."""
    item = _best(row)
    if item is None:
        return Media(
            "none", note="" if row.get("recipe") == "prompts" else "nothing that a page can show was kept of it"
        )
    try:
        data = _read(storage, item)
        too_large = len(data) * 4 // 3 > share
        if _is_strip(item, row):
            return Media("strip", _uri(item["mime"], data), frames=_strip_frames(data, row))
        if item["mime"] == "video/mp4":
            shown = _smaller_video(data, row["fps"], *(LESS_SMALL if share >= ROOMY else SMALL)) if too_large else data
            return Media("video", _uri("video/mp4", shown), note="smaller copy" if too_large else "")
        if too_large:
            return Media("image", _uri("image/webp", _smaller_image(data, 3 * SMALL[0])), note="smaller copy")
        return Media("image", _uri(item["mime"], data))
    except Exception as error:  # a report comes out of a damaged dataset too; `ditmill verify` says what is wrong
        return Media("none", note=f"cannot be shown: {error or type(error).__name__}"[:200])


def still(storage: Storage, row: dict[str, Any], side: int) -> np.ndarray | None:
    """The middle frame of what is kept of the sample, [h, w, 3] uint8; None where nothing is, or cannot be read.

    A video's frame comes with a shorter side of at most `side` pixels.
    """
    item = _best(row)
    if item is None:
        return None
    try:
        data = _read(storage, item)
        if item["mime"] == "video/mp4":
            return next(itertools.islice(_frames(data, side), row["num_frames"] // 2, None), None)
        picture = decode(data, SUFFIXES[item["mime"]])[0]
        frames = np.array_split(picture, _strip_frames(data, row) if _is_strip(item, row) else 1, axis=1)
        return frames[len(frames) // 2]
    except Exception:
        return None


def _best(row: dict[str, Any]) -> dict[str, Any] | None:
    """The media to show; a preview only where there is nothing better."""
    found = [item for item in row["media"] or () if item["mime"] in SUFFIXES]
    return min(found, key=lambda item: item["role"] == "preview", default=None)


def _is_strip(item: dict[str, Any], row: dict[str, Any]) -> bool:
    return item["role"] == "preview" and row["num_frames"] > 1 and item["mime"] != "video/mp4"


def _read(storage: Storage, item: dict[str, Any]) -> bytes:
    shard = item["shard"] or ""
    if outside(shard):
        raise ValueError(f"it lives outside of the dataset, in {shard}")
    data = storage.read_bytes(shard, item["offset"], item["offset"] + item["nbytes"])
    if len(data) != item["nbytes"]:
        raise ValueError(f"expected {item['nbytes']} bytes of {shard}, found {len(data)}")
    return data


def _uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _smaller_video(data: bytes, fps: float, side: int, crf: int) -> bytes:
    return encode(np.stack(list(_frames(data, side))), fps or 8.0, crf=crf).data


def _frames(data: bytes, side: int) -> Iterator[np.ndarray]:
    """The frames of a video, [h, w, 3] uint8 of even size, made smaller one by one so that few are in memory."""
    import av

    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode(video=0):
            scale = min(1.0, side / min(frame.height, frame.width))
            width, height = (max(2, round(length * scale / 2) * 2) for length in (frame.width, frame.height))
            yield frame.to_ndarray(format="rgb24", width=width, height=height)


def _smaller_image(data: bytes, side: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        image.convert("RGB").save(buffer, "webp", quality=80)
    return buffer.getvalue()


def _strip_frames(data: bytes, row: dict[str, Any]) -> int:
    """How many frames of the sample's own shape lie side by side."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return max(1, round(image.width / image.height * row["height"] / row["width"]))
