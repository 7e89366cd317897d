"""Members of shards as rows refer to them: by shard, offset and length, and held to the sha256 that was recorded."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from infra.errors import UserError
from infra.shard import outside
from infra.storage import Storage

Reference = Mapping[str, Any]
"""An element of a row's `media` or `tensors`."""


class MemberError(UserError):
    """Stored bytes are not what a row says of them."""

    def __init__(self, kind: Literal["broken", "missing", "changed"], item: Reference, said: str) -> None:
        super().__init__(kind, item, said)
        self.kind, self.said = kind, said
        self.where = " ".join(f"{item['shard']} {item['member']}".split())

    def __str__(self) -> str:
        mend = "withdraw the sample, or restore the file (`ditmill verify` lists what else is wrong)"
        return f"{self.where}: {self.said}; {mend}"


def read_member(storage: Storage, item: Reference, data: bytes | None = None) -> bytes:
    """The bytes that `item` refers to, read unless `data` is what was read there. MemberError where they are not those that
    were recorded, OSError where the storage fails."""
    if outside(item["shard"]):
        raise MemberError("broken", item, "lies outside of the dataset")
    try:
        data = storage.read_bytes(*_place(item)) if data is None else data
    except FileNotFoundError as error:
        raise MemberError("missing", item, "is not there") from error
    if hashlib.sha256(data).hexdigest() != item["sha256"]:
        raise MemberError("changed", item, "its bytes do not have the recorded sha256")
    return data


def read_members(storage: Storage, items: Sequence[Reference]) -> Iterator[bytes | MemberError]:
    """The bytes of each, or what is wrong with it. All are asked for at once, and each by itself where one cannot be had."""
    try:
        inside = [_place(item) for item in items if not outside(item["shard"])]
        found: Iterator[bytes | None] = iter(storage.read_ranges(inside))
    except OSError:
        found = itertools.repeat(None)
    for item in items:
        try:
            yield read_member(storage, item, None if outside(item["shard"]) else next(found))
        except MemberError as error:
            yield error


def _place(item: Reference) -> tuple[str, int, int]:
    return item["shard"], item["offset"], item["offset"] + item["nbytes"]
