"""ReadMedia and DecodeStored: what is stored of samples that exist already becomes frames again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.members import MemberError, read_members
from infra.shard import read_safetensors
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
        for at, (source, data) in enumerate(zip(sources, read_members(self.storage, sources), strict=True)):
            values, kinds[at], errors[at] = self._values(source, data, (*shape, 3), latents)
            found.append(values)
        sound = next((values for values in found if values is not None), np.zeros((*shape, 3), np.uint8))
        stacked = np.stack([np.zeros_like(sound) if values is None else values for values in found])
        read = {**batch, "error_type": texts(kinds), "error": texts(errors)}
        return {**read, "latents" if latents and any(values is not None for values in found) else "frames": stacked}

    def _values(
        self, source: dict[str, Any], data: bytes | MemberError, shape: tuple[int, ...], latents: bool
    ) -> tuple[np.ndarray | None, str, str]:
        """Frames or latents of one member; or None, what kind of failure, and its text."""
        if isinstance(data, MemberError):
            return None, f"stored_media_{data.kind}", f"{data.where}: {data.said}"
        place = f"{source['shard']} {source['member']}"
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
