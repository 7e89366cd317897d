"""LookAtClips: the frames of a clip that scores, judge and captioner are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np

from infra.storage import Storage
from stages.batch import Batch, SampleError, load_json, size, texts
from stages.clip import Wanted, read
from stages.crop import Box
from stages.index import opened_source, scaled

CUT_FROM = "cut_from"
"""In `extra_json`: what was probed of a clip's source, and what of its picture is cropped; before a user's column."""


@dataclass(frozen=True)
class LookAtClips:
    """Reads `inputs`, `extra`, `height`, `width`, `num_frames` and `fps`; adds `frames` [n, T, H, W, 3] uint8, at most
    `fps` a second and `side` pixels on their longer side. `noise_key` becomes empty: nothing was drawn from noise.

    Fails a clip whose file is gone (`source_missing`), has another length than when it was indexed (`source_changed`), or can
    no more be read (see stages.clip).
    """

    storage: Storage
    fps: float
    side: int
    max_bytes: int

    name: ClassVar[str] = "look"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "extra", "height", "width", "num_frames", "fps")
    adds: ClassVar[tuple[str, ...]] = ("frames", "noise_key")
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import av
        import cv2

        av.logging.set_level(None)
        cv2.setNumThreads(1)

    def __call__(self, batch: Batch) -> Batch:
        count, own = size(batch), float(batch["fps"][0])
        shape = scaled((int(batch["height"][0]), int(batch["width"][0])), self.side)
        number = int(batch["num_frames"][0])
        if number > 1 and own > self.fps:
            number = max(2, round(number * self.fps / own))
        frames = np.zeros((count, number, *shape, 3), np.uint8)
        kinds, errors = [""] * count, [""] * count
        for at, (inputs, extra) in enumerate(zip(load_json(batch["inputs"]), load_json(batch["extra"]), strict=True)):
            try:
                with opened_clip(inputs[0], extra, self.storage, self.max_bytes) as file:
                    frames[at] = clip_frames(file, inputs[0], extra, number, shape)
            except SampleError as fault:
                kinds[at], errors[at] = fault.error_type, f"{inputs[0]['uri']}: {fault}"
        drawn = {"frames": frames, "noise_key": texts([""] * count)}
        return {**batch, **drawn, "error_type": texts(kinds), "error": texts(errors)}


@contextmanager
def opened_clip(clip: dict[str, Any], extra: dict[str, Any], storage: Storage, max_bytes: int) -> Iterator[BinaryIO]:
    """The file of a clip: `clip` is a row's input, `extra` what its record says of the source. SampleError where it is not
    the file any more that was indexed."""
    with opened_source(clip["uri"], storage, max_bytes) as file:
        nbytes, indexed = file.seek(0, 2), extra[CUT_FROM]["nbytes"]
        if nbytes != indexed:
            raise SampleError("source_changed", f"it had {indexed} bytes, and has {nbytes}")
        yield file


def clip_frames(
    file: BinaryIO, clip: dict[str, Any], extra: dict[str, Any], count: int, shape: tuple[int, int]
) -> np.ndarray:
    """`count` frames of a clip at an even rate: uint8 [count, height, width, 3]."""
    start, end = clip["start"] or 0.0, clip["end"] or 0.0
    crop = extra[CUT_FROM]["crop"]
    box = None if crop is None else Box(*crop)
    fps = count / (end - start) if end > start else None
    return read(file, start, end, Wanted(fps=fps, num_frames=count, box=box, shape=shape))


def source_of(inputs: str) -> str:
    """What tells the source of a clip from others, by its `inputs` as JSON: the content of its file."""
    first = json.loads(inputs)[0]
    return str(first["sha256"] or first["uri"])
