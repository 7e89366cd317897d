"""Media that a sample brings along: the first frame of image-to-video."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np


class InputError(ValueError):
    """A sample's input is missing or cannot be used: that sample fails, not the batch."""


def first_frame(inputs: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """The image with role `first_frame`, as uint8 [height, width, 3] RGB.

    It is cut to the wanted aspect ratio at its centre, then resized (Lanczos). A sha256 in the record must match.
    """
    from PIL import Image

    item = next((item for item in inputs if item.get("role") == "first_frame"), None)
    if item is None:
        raise InputError("inputs: expected one with role first_frame, found none")
    data = _read(item)
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
    except Exception as error:
        raise InputError(f"inputs: {item['uri']} is not an image that can be read ({error})") from error
    cut_width = min(picture.width, round(picture.height * width / height))
    cut_height = min(picture.height, round(picture.width * height / width))
    left, top = (picture.width - cut_width) // 2, (picture.height - cut_height) // 2
    picture = picture.crop((left, top, left + cut_width, top + cut_height))
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)


def _read(item: dict[str, Any]) -> bytes:
    import fsspec

    uri = item.get("uri") or ""
    try:
        with fsspec.open(uri, "rb") as file:
            data: bytes = file.read()
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        raise InputError(f"inputs: {uri or 'no uri'} does not exist or cannot be opened") from error
    expected = item.get("sha256")
    found = hashlib.sha256(data).hexdigest()
    if expected and expected != found:
        raise InputError(f"inputs: {uri} has sha256 {found}, expected {expected}")
    return data
