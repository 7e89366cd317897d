"""Files that a dataset refers to and does not hold: here, on S3, behind HTTP, or a member of a tar at any of these.

A member's uri is its tar's, then `#name@offset+nbytes`: it is read by offset, so that no other byte of the tar is, and its
name is only said, never made a path.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from infra.storage import Storage

BLOCK = 2**20
_MEMBER = re.compile(r"(?P<tar>.+?\.tar)#(?P<name>.+)@(?P<offset>\d+)\+(?P<nbytes>\d+)", re.DOTALL)


class Member(NamedTuple):
    """A file in a tar."""

    tar: str
    name: str
    offset: int
    nbytes: int

    @property
    def uri(self) -> str:
        return f"{self.tar}#{self.name}@{self.offset}+{self.nbytes}"


class TooLargeError(ValueError):
    """A file that was to be fetched whole has more bytes than it may."""


def member_of(uri: str) -> Member | None:
    """What a member's uri says; None for one of a file of its own."""
    found = _MEMBER.fullmatch(uri)
    return None if found is None else Member(found["tar"], found["name"], int(found["offset"]), int(found["nbytes"]))


def filesystem(uri: str, like: Storage | None = None) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path on it. `like` says how S3 is reached."""
    if like is not None and uri.startswith(("s3://", "s3a://")):
        from infra import s3

        root = replace(like, root=uri)
        return s3.filesystem(root, cache_type="readahead"), root.path()
    import fsspec

    if "://" not in uri:
        return fsspec.filesystem("file"), uri
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, str(path)


@contextlib.contextmanager
def opened(uri: str, like: Storage | None = None, most: int | None = None) -> Iterator[BinaryIO]:
    """A file to read and to seek in. What comes by HTTP, whose servers need not know ranges, is fetched whole into a
    temporary file; TooLargeError where it has more than `most` bytes. OSError where it cannot be had."""
    member = member_of(uri)
    fs, path = filesystem(member.tar if member else uri, like)
    if member is not None:
        with fs.open(path, "rb") as tar:
            yield cast(BinaryIO, io.BufferedReader(_Window(tar, member.offset, member.nbytes), BLOCK))
    elif uri.startswith(("http://", "https://")):
        with tempfile.TemporaryFile() as fetched:
            _fetch(fs, path, cast(BinaryIO, fetched), most)
            yield cast(BinaryIO, fetched)
    else:
        with fs.open(path, "rb") as file:
            yield cast(BinaryIO, file)


def _fetch(fs: AbstractFileSystem, path: str, into: BinaryIO, most: int | None) -> None:
    with fs.open(path, "rb", block_size=0) as answer:  # a stream: no ranges are asked for
        while block := answer.read(BLOCK):
            into.write(block)
            if most is not None and into.tell() > most:
                raise TooLargeError(f"{path} has more than {most} bytes")
    into.seek(0)


class _Window(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, nbytes: int) -> None:
        self._file, self._offset, self._nbytes, self._at = file, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._nbytes - self._at)
        if wanted <= 0:
            return 0
        self._file.seek(self._offset + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
