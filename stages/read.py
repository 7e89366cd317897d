"""ReadMedia and DecodeStored: what is stored of samples that exist already becomes frames again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.shard import outside, read_safetensors
from infra.storage import Storage
from stages.batch import Batch, HoldsStage, size, texts

SUFFIXES = {"video/mp4": "mp4", "image/png": "png", "image/webp": "webp"}


@dataclass(frozen=True)
class ReadMedia:
    """Reads `source` (JSON: a reference of `media` or `tensors` of the sample's row); adds `frames` [n, T, H, W, 3] uint8, or
    `latents` float32 as they were stored: a batch is of either. All members of a batch are asked for at once.

    Fails a sample whose member is gone
    (`stored_media_missing`), has other bytes than recorded (`stored_media_changed`) or is no such media
    (`stored_media_broken`); storage that is down is the caller's trouble.
    """

    storage: Storage

    name: ClassVar[str] = "read"
    reads: ClassVar[tuple[str, ...]] = ("source", "generator", "height", "width", "num_frames")
    adds: ClassVar[tuple[str, ...]] = ("frames", "latents")
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        """Nothing."""

    def __call__(self, batch: Batch) -> Batch:
        sources = [json.loads(source) for source in batch["source"]]
        latents = "dtype" in sources[0]
        shape = tuple(int(batch[name][0]) for name in ("num_frames", "height", "width"))
        found: list[np.ndarray | None] = []
        kinds, errors = [""] * size(batch), [""] * size(batch)
        for at, (source, data) in enumerate(zip(sources, self._members(sources), strict=True)):
            values, kinds[at], errors[at] = self._values(source, data, (*shape, 3), latents)
            found.append(values)
        sound = next((values for values in found if values is not None), np.zeros((*shape, 3), np.uint8))
        stacked = np.stack([np.zeros_like(sound) if values is None else values for values in found])
        read = {**batch, "error_type": texts(kinds), "error": texts(errors)}
        return {**read, "latents" if latents and any(values is not None for values in found) else "frames": stacked}

    def _members(self, sources: list[dict[str, Any]]) -> Sequence[bytes | None]:
        """The bytes of all members, asked for at once; None for each where they cannot be had like that."""
        try:
            inside = [source for source in sources if not outside(source["shard"])]
            places = [(each["shard"], each["offset"], each["offset"] + each["nbytes"]) for each in inside]
            found = iter(self.storage.read_ranges(places))
            return [None if outside(source["shard"]) else next(found) for source in sources]
        except OSError:
            return [None] * len(sources)

    def _values(
        self, source: dict[str, Any], data: bytes | None, shape: tuple[int, ...], latents: bool
    ) -> tuple[np.ndarray | None, str, str]:
        """Frames or latents of one member, read by itself if it has not been; or None, what kind of failure, and its text."""
        place = f"{source['shard']} {source['member']}"
        if outside(source["shard"]):
            return None, "stored_media_broken", f"{place}: lies outside of the dataset"
        try:
            if data is None:
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


@dataclass(frozen=True)
class DecodeStored(HoldsStage):
    """`stage`, DecodeLatents, of batches that were stored as latents; others have their frames."""

    def load(self) -> None:
        """Nothing: a generator's decoder is loaded when the first latents come."""

    def wants(self, batch: Batch) -> np.ndarray:
        return np.full(size(batch), "latents" in batch)

    def __call__(self, batch: Batch) -> Batch:
        return self.stage(batch)
