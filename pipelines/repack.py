"""Many small shards to few large ones: the media of chosen samples, copied into one tar as it streams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import pyarrow as pa

from infra.errors import UserError
from infra.members import MemberError, read_member
from infra.shard import TarWriter, is_member
from infra.storage import Storage
from stages.write import sidecar

READERS = 8
AHEAD = 32
"""Samples that are read at once, and so in memory."""

Row = dict[str, Any]
File = dict[str, Any]
"""path, nbytes and sha256 of a written file."""


class Hashed:
    """A file that remembers the sha256 and the length of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def entry(self, path: str) -> File:
        return {"path": path, "nbytes": self.nbytes, "sha256": self._sha256.hexdigest()}


def pack(storage: Storage, rows: pa.Table, path: str) -> tuple[pa.Table, File]:
    """Copy what `rows` refer to into one tar at `path`, by sample id; the rows with references to it, and the file.

    Each sample brings its media, its tensors and a .json of its row as it is in `rows`. The same rows give the same bytes.
    UserError where stored media are not what their row says.
    """
    rows = rows.sort_by("sample_id")
    media: list[list[Row]] = []
    tensors: list[list[Row]] = []
    with storage.writing(path) as file, ThreadPoolExecutor(READERS) as pool:
        hashed = Hashed(file)
        tar = TarWriter(hashed)
        for batch in rows.to_batches(max_chunksize=AHEAD):
            ready = batch.to_pylist()
            for row, data in zip(ready, pool.map(lambda row: list(_members(storage, row)), ready), strict=True):
                places = {name: tar.add(name, content) for name, content in sorted(data)}
                for item in (*row["media"], *row["tensors"]):
                    item["shard"] = path
                    item["offset"], item["nbytes"] = places[item["member"]]
                media.append(row["media"])
                tensors.append(row["tensors"])
        tar.close()
    for name, values in (("media", media), ("tensors", tensors)):
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows, hashed.entry(path)


def _members(storage: Storage, row: Row) -> Iterator[tuple[str, bytes]]:
    if not is_member(f"{row['sample_id']}.json", row["sample_id"]):
        raise UserError(
            f"sample {row['sample_id'][:40]!r}: is no sample's id, something else wrote to `samples`; restore it"
        )
    yield f"{row['sample_id']}.json", sidecar(row)
    for item in (*row["media"], *row["tensors"]):
        try:
            if not is_member(item["member"], row["sample_id"]):
                raise MemberError("broken", item, "lies outside of the dataset, or has not the sample's name")
            data = read_member(storage, item)
        except MemberError as error:
            raise UserError(f"sample {row['sample_id']}: {error}") from error
        yield item["member"], data
