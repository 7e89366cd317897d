"""What tells stored media apart: perceptual hashes and embeddings, computed once for each media file of a dataset.

    cache/signatures/<kind>/<nonce>.parquet      sha256 of a media file, and its signature: fixed bytes

Nothing else refers to the folder; without it signatures are computed anew. Members are read shard by shard, in their order,
and each is decoded once for all kinds.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.media import decode_at
from infra.shard import outside
from infra.storage import Storage
from stages.read import SUFFIXES

FOLDER = "cache/signatures"
READERS = 8
AT_ONCE = 16
"""Clips whose frames are in memory at a time."""
PART_ROWS = 4096
"""Signatures of a file, and so the most that a process loses that is killed."""

SHOWN = 3

HASH_FRAMES = (1 / 6, 1 / 2, 5 / 6)
HASH_CELLS = 4
EMBEDDING_DIMS = 256
"""Longer embeddings are projected to so many dimensions: 512 bytes a sample."""

Progress = Callable[[int, int], None]
"""Media looked at, and how many there are to look at."""


class Place(NamedTuple):
    """A media file of a sample."""

    sha256: bytes
    shard: str
    offset: int
    nbytes: int
    suffix: str
    num_frames: int


class Kind(Protocol):
    """One kind of signature."""

    @property
    def name(self) -> str:
        """Of its folder: another name for whatever changes its values."""
        ...

    def positions(self, num_frames: int) -> np.ndarray:
        """Numbers of the frames that it looks at, rising."""
        ...

    def compute(self, clips: list[np.ndarray]) -> list[bytes]:
        """Signatures, all equally long, of those frames of clips, each uint8 [k, H, W, 3]."""
        ...


@dataclass(frozen=True)
class HashKind:
    """Three 64-bit DCT hashes of luma (imagehash) and a 4 x 4 copy of chroma (BT.601) of each: 24 + 96 bytes."""

    name: str = "hash-1"

    def positions(self, num_frames: int) -> np.ndarray:
        return np.unique(np.round(np.array(HASH_FRAMES) * (num_frames - 1)).astype(int))

    def compute(self, clips: list[np.ndarray]) -> list[bytes]:
        return [_hash(frames) for frames in clips]


def _hash(frames: np.ndarray) -> bytes:
    import cv2
    import imagehash
    from PIL import Image

    shown = frames[np.linspace(0, len(frames) - 1, len(HASH_FRAMES)).round().astype(int)]
    bits = [np.packbits(imagehash.phash(Image.fromarray(frame), hash_size=8).hash) for frame in shown]
    size = (HASH_CELLS, HASH_CELLS)
    small = [
        cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb), size, interpolation=cv2.INTER_AREA) for frame in shown
    ]
    return b"".join([each.tobytes() for each in bits] + [each[..., 1:].tobytes() for each in small])


def hashes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signatures uint8 [n, 120] of HashKind as luma uint64 [n, 3] and chroma uint8 [n, 96]."""
    return np.ascontiguousarray(values[:, :24]).view(np.uint64), np.ascontiguousarray(values[:, 24:])


@dataclass(frozen=True)
class EmbeddingKind:
    """Embeddings by `embed` (frames uint8 [n, T, H, W, 3] to floats [n, d]), at length 1, in float16.

    `version` names whatever `embed` depends on. More than EMBEDDING_DIMS are projected by a fixed Gaussian matrix: a cosine c
    moves by about (1 - c^2) / 16 (Johnson and Lindenstrauss 1984; Kaban 2015 for dot products), little near 1.
    """

    embed: Callable[[np.ndarray], np.ndarray]
    version: str
    num_frames: int = 8

    @cached_property
    def name(self) -> str:
        said = json.dumps([1, self.version, self.num_frames, EMBEDDING_DIMS])
        return f"embedding-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    def positions(self, num_frames: int) -> np.ndarray:
        return np.linspace(0, num_frames - 1, min(self.num_frames, num_frames)).round().astype(int)

    def compute(self, clips: list[np.ndarray]) -> list[bytes]:
        found: list[bytes] = [b""] * len(clips)
        shapes = [clip.shape for clip in clips]
        for shape in dict.fromkeys(shapes):
            some = [at for at, mine in enumerate(shapes) if mine == shape]
            answer = self.embed(np.stack([clips[at] for at in some]))
            try:
                values = np.asarray(answer, np.float32)
            except (TypeError, ValueError):
                values = np.empty(0, np.float32)
            if values.ndim != 2 or len(values) != len(some) or not np.isfinite(values).all():
                raise UserError(
                    f"embedding: {self.version}: expected {len(some)} vectors of finite numbers, found shape"
                    f" {list(values.shape)}{'' if np.isfinite(values).all() else ' with some that are not'}"
                )
            for at, value in zip(some, _unit(values), strict=True):
                found[at] = value.astype("<f2").tobytes()
        return found


def _unit(values: np.ndarray) -> np.ndarray:
    dims = values.shape[1]
    if dims > EMBEDDING_DIMS:
        random = np.random.Generator(np.random.Philox(key=dims))
        values = values @ random.standard_normal((dims, EMBEDDING_DIMS)).astype(np.float32)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def embeddings(values: np.ndarray) -> np.ndarray:
    """Signatures uint8 [n, 2 d] of EmbeddingKind as float16 [n, d]."""
    return np.ascontiguousarray(values).view("<f2")


def place_of(row: Mapping[str, Any]) -> Place | None:
    """The video or image of a row of `samples` (its `media` and `num_frames`); None where there is none that can be read."""
    for item in row["media"] or ():
        if item["role"] in ("video", "image") and item["mime"] in SUFFIXES and not outside(item["shard"]):
            sha256 = bytes.fromhex(item["sha256"])
            suffix = SUFFIXES[item["mime"]]
            return Place(sha256, item["shard"], item["offset"], item["nbytes"], suffix, row["num_frames"] or 1)
    return None


class Signatures:
    """Signatures of media, by their sha256, from the cache or computed.

    Media that are gone, changed or broken have none: `faults` has the first few reasons. OSError where the storage fails.
    """

    def __init__(self, storage: Storage, kinds: list[Kind], progress: Progress) -> None:
        self._storage, self._kinds, self._progress = storage, kinds, progress
        self.faults: list[str] = []

    def of(self, sha256: np.ndarray, places: Callable[[], Iterator[Place]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each kind: signatures uint8 [n, bytes], and which of the media [n] have one.

        Args:
            sha256: S32 [n]; may name one more than once.
            places: gives where media are, those of `sha256` among them, in an order in which shards are read best.
        """
        unique = np.unique(sha256)
        lacking = [~_read(self._storage, kind, unique)[1] for kind in self._kinds]
        if unique.size and np.any(lacking):
            self._compute(unique, lacking, places())
        at = np.searchsorted(unique, sha256)
        found = [_read(self._storage, kind, unique) for kind in self._kinds]
        return [(values[at], known[at]) for values, known in found]

    def _compute(self, unique: np.ndarray, lacking: list[np.ndarray], places: Iterator[Place]) -> None:
        todo = np.logical_or.reduce(lacking)
        total, done = int(todo.sum()), 0
        waiting: list[list[tuple[bytes, bytes]]] = [[] for _ in self._kinds]
        with ThreadPoolExecutor(READERS) as pool:
            while chunk := list(itertools.islice(_wanted(places, unique, todo), AT_ONCE)):
                looked = pool.map(lambda item: self._look(item[1], [rows[item[0]] for rows in lacking]), chunk)
                clips = [(at, clip) for (at, _), clip in zip(chunk, looked, strict=True) if clip is not None]
                for kind, rows, new in zip(self._kinds, lacking, waiting, strict=True):
                    mine = [(at, frames[kind.name]) for at, frames in clips if rows[at]]
                    values = kind.compute([frames for _, frames in mine])
                    new += [
                        (bytes(unique[at]).ljust(32, b"\0"), value) for (at, _), value in zip(mine, values, strict=True)
                    ]
                    if len(new) >= PART_ROWS:
                        _write(self._storage, kind, new)
                        new.clear()
                done += len(chunk)
                self._progress(done, total)
        for kind, new in zip(self._kinds, waiting, strict=True):
            if new:
                _write(self._storage, kind, new)

    def _look(self, place: Place, lacking: list[bool]) -> dict[str, np.ndarray] | None:
        """The frames that each kind looks at; None where the media cannot be read."""
        kinds = [kind for kind, lacks in zip(self._kinds, lacking, strict=True) if lacks]
        shown = {kind.name: kind.positions(place.num_frames) for kind in kinds}
        positions = np.unique(np.concatenate(list(shown.values())))
        try:
            data = self._storage.read_bytes(place.shard, place.offset, place.offset + place.nbytes)
        except FileNotFoundError as error:
            self._fault(place, error)
            return None
        try:
            if hashlib.sha256(data).digest() != place.sha256:
                raise ValueError("its bytes do not have the recorded sha256")
            frames = decode_at(data, place.suffix, positions)
        except Exception as error:
            self._fault(place, error)
            return None
        return {name: frames[np.searchsorted(positions, mine)] for name, mine in shown.items()}

    def _fault(self, place: Place, error: Exception) -> None:
        if len(self.faults) < SHOWN:
            self.faults.append(f"{place.shard}: {type(error).__name__}: {error}"[:200])


def _wanted(places: Iterator[Place], unique: np.ndarray, todo: np.ndarray) -> Iterator[tuple[int, Place]]:
    """Those of `places` that are still to do, with their row of `unique`; each once."""
    for place in places:
        at = int(np.searchsorted(unique, np.bytes_(place.sha256.rstrip(b"\0"))))
        if at < len(unique) and unique[at] == place.sha256.rstrip(b"\0") and todo[at]:
            todo[at] = False
            yield at, place


def _read(storage: Storage, kind: Kind, unique: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the cache has of media (S32, sorted): signatures uint8 [n, bytes], and which are there."""
    known = np.zeros(len(unique), bool)
    values = np.zeros((len(unique), 0), np.uint8)
    for name in sorted(storage.files(f"{FOLDER}/{kind.name}")):
        if not name.endswith(".parquet"):
            continue
        rows = pq.read_table(io.BytesIO(storage.read_bytes(name))).combine_chunks()
        keys = _fixed(rows["sha256"]).view("S32").ravel()
        found = _fixed(rows["value"])
        if not known.any():
            values = np.zeros((len(unique), found.shape[1]), np.uint8)
        at = np.minimum(np.searchsorted(unique, keys), max(0, len(unique) - 1))
        mine = (unique[at] == keys) & ~known[at] if len(unique) else np.zeros(len(keys), bool)
        if mine.any() and found.shape[1] != values.shape[1]:
            raise UserError(
                f"embedding.version: it has given vectors of {values.shape[1] // 2} and of {found.shape[1] // 2} numbers;"
                " change it whenever the code changes"
            )
        values[at[mine]] = found[mine] if mine.any() else values[at[mine]]
        known[at[mine]] = True
    return values, known


def _fixed(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size binary as uint8 [n, size]."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    size = array.type.byte_width
    raw = np.frombuffer(array.buffers()[1], np.uint8, count=size * len(array), offset=size * array.offset)
    return raw.reshape(len(array), size)


def _write(storage: Storage, kind: Kind, rows: list[tuple[bytes, bytes]]) -> None:
    keys, values = zip(*rows, strict=True)
    table = pa.table({"sha256": pa.array(keys, pa.binary(32)), "value": pa.array(values, pa.binary(len(values[0])))})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(f"{FOLDER}/{kind.name}/{uuid4().hex[:12]}.parquet", sink.getvalue())
