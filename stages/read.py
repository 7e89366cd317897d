"""ReadMedia: what is stored of samples that exist already becomes frames again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.shard import outside, read_safetensors
from infra.storage import Storage
from stages.batch import Batch, size, texts
from stages.decode import DecodeLatents

SUFFIXES = {"video/mp4": "mp4", "image/png": "png", "image/webp": "webp"}


@dataclass(frozen=True)
class ReadMedia:
    """Reads `source` (JSON: a reference of `media` or `tensors` of the sample's row); adds `frames` [n, T, H, W, 3] uint8.

    A batch is either of media or of latents, and those are decoded by `decoder`. Fails a sample whose member is gone
    (`stored_media_missing`), has other bytes than recorded (`stored_media_changed`) or is no such media
    (`stored_media_broken`); storage that is down is the caller's trouble.
    """

    storage: Storage
    decoder: DecodeLatents

    name: ClassVar[str] = "read"
    reads: ClassVar[tuple[str, ...]] = ("source", "generator", "height", "width", "num_frames")
    adds: ClassVar[tuple[str, ...]] = ("frames",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        """Nothing: a generator's decoder is loaded when the first latents come."""

    def __call__(self, batch: Batch) -> Batch:
        sources = [json.loads(source) for source in batch["source"]]
        latents = "dtype" in sources[0]
        shape = tuple(int(batch[name][0]) for name in ("num_frames", "height", "width"))
        found: list[np.ndarray | None] = []
        kinds, errors = [""] * size(batch), [""] * size(batch)
        for at, source in enumerate(sources):
            values, kinds[at], errors[at] = self._values(source, (*shape, 3), latents)
            found.append(values)
        sound = next((values for values in found if values is not None), np.zeros((*shape, 3), np.uint8))
        stacked = np.stack([np.zeros_like(sound) if values is None else values for values in found])
        read = {**batch, "error_type": texts(kinds), "error": texts(errors)}
        if not latents or not any(values is not None for values in found):
            return {**read, "frames": stacked}
        decoded = self.decoder({**read, "latents": stacked})
        return {name: column for name, column in decoded.items() if name != "latents"}

    def _values(
        self, source: dict[str, Any], shape: tuple[int, ...], latents: bool
    ) -> tuple[np.ndarray | None, str, str]:
        """Frames or latents of one member; or None, what kind of failure, and its text."""
        place = f"{source['shard']} {source['member']}"
        if outside(source["shard"]):
            return None, "stored_media_broken", f"{place}: lies outside of the dataset"
        try:
            data = self.storage.read_bytes(source["shard"], source["offset"], source["offset"] + source["nbytes"])
        except FileNotFoundError:
            return None, "stored_media_missing", f"{place}: is not there"
        except OSError:
            # An object store refuses a range that lies beyond the object; else the storage is to blame.
            if self.storage.size(source["shard"]) > source["offset"]:
                raise
            data = b""
        if hashlib.sha256(data).hexdigest() != source["sha256"]:
            return None, "stored_media_changed", f"{place}: its bytes do not have the recorded sha256"
        try:
            values = self._parse(data, source, latents)
        except Exception as error:
            return None, "stored_media_broken", f"{place}: {type(error).__name__}: {error}"
        wanted = tuple(source["shape"]) if latents else shape
        if values.shape != wanted:
            return None, "stored_media_broken", f"{place}: expected {list(wanted)}, found {list(values.shape)}"
        return values, "", ""

    def _parse(self, data: bytes, source: dict[str, Any], latents: bool) -> np.ndarray:
        from infra.media import decode

        return read_safetensors(data, "latents") if latents else decode(data, SUFFIXES[source["mime"]])
