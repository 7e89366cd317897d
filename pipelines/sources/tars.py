"""Tars, WebDataset's above all: members of one key (a name up to its first dot) lie together, and are one item."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from infra.errors import UserError
from infra.opening import Member, filesystem
from infra.secrets import redact
from pipelines.record_fields import clean_text
from pipelines.sources.item import SIDECARS, Item, Place, is_media, suffix_of


def items(place: Place) -> Iterator[Item]:
    """Members that are videos or images, in the order of the tars' names and of their places in them. Of a tar only headers
    are read; one that is damaged gives what comes before, and then an item with an `error`."""
    fs, path = filesystem(place.source.path, place.storage)
    paths = sorted(str(found) for found in fs.glob(path)) if "*" in path else [path]
    if not paths or not fs.exists(paths[0]):
        raise UserError(
            f"{place.key}.path: {redact(place.source.path)} does not exist; name a tar, or several with a *"
        )
    scheme = place.source.path.partition("://")[0] + "://" if "://" in place.source.path else ""
    for tar in paths:
        with fs.open(tar, "rb") as file:
            yield from _grouped(scheme + tar, _members(scheme + tar, file))


def _members(uri: str, file: BinaryIO) -> Iterator[Member | str]:
    """Regular files of a tar; at the end, where it is damaged, what is wrong."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep a header of each
                if info.isreg():
                    yield Member(uri, clean_text(info.name)[0], info.offset_data, info.size)
            file.seek(tar.offset)  # tarfile takes a header that is none for the end
            if file.read(512).strip(b"\0"):
                yield f"{redact(uri)} is damaged at byte {tar.offset}"
    except (tarfile.TarError, EOFError, ValueError) as error:
        yield f"{redact(uri)} is no whole tar ({' '.join(str(error).split())[:200]})"


def _grouped(uri: str, members: Iterator[Member | str]) -> Iterator[Item]:
    key, group = "", list[Member]()
    for member in members:
        if isinstance(member, str):
            yield from _items(group)
            yield Item(uri, error=member)
            return
        mine = _key(member.name)
        if mine != key:
            yield from _items(group)
            key, group = mine, []
        group.append(member)
    yield from _items(group)


def _items(group: list[Member]) -> Iterator[Item]:
    sidecars = tuple(member.uri for suffix in SIDECARS for member in group if suffix_of(member.name) == suffix)
    for member in group:
        if is_media(member.name):
            yield Item(member.uri, sidecars=sidecars)


def _key(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])
