"""A folder, or a prefix of a bucket: all videos and images below it, by name, with captions in files beside them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.opening import filesystem
from infra.secrets import redact
from pipelines.record_fields import clean_text
from pipelines.sources.item import SIDECARS, Item, Place, is_media, suffix_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def items(place: Place) -> Iterator[Item]:
    """Files in the order of their names, those of a folder before those of the folders in it. Links to folders are not
    followed, and what begins with a dot is left out."""
    fs, path = filesystem(place.source.path, place.storage)
    if not fs.exists(path):
        raise UserError(
            f"{place.key}.path: {redact(place.source.path)} does not exist; name a folder of videos or images"
        )
    if fs.isfile(path):
        raise UserError(f"{place.key}.path: {redact(place.source.path)} is a file; name its folder, a tar or a table")
    scheme = place.source.path.partition("://")[0] + "://" if "://" in place.source.path else ""
    yield from _below(fs, path.rstrip("/"), scheme)


def _below(fs: AbstractFileSystem, path: str, scheme: str) -> Iterator[Item]:
    found: list[dict[str, Any]] = sorted(fs.ls(path, detail=True), key=lambda entry: str(entry["name"]))
    found = [entry for entry in found if not posixpath.basename(entry["name"].rstrip("/")).startswith(".")]
    files = [str(entry["name"]) for entry in found if entry["type"] == "file"]
    names = set(files)
    for name in files:
        if is_media(name):
            stem = name[: -len(suffix_of(name)) - 1]
            beside = tuple(_uri(f"{stem}.{suffix}", scheme) for suffix in SIDECARS if f"{stem}.{suffix}" in names)
            uri = _uri(name, scheme)
            yield Item(uri, sidecars=beside, error="" if uri == name or scheme else _unnamed(name))
    for entry in found:
        if entry["type"] == "directory" and not entry.get("islink") and entry["name"].rstrip("/") != path:
            yield from _below(fs, str(entry["name"]).rstrip("/"), scheme)


def _uri(name: str, scheme: str) -> str:
    return clean_text(scheme + name.removeprefix("/") if scheme.startswith("file") else scheme + name)[0]


def _unnamed(name: str) -> str:
    return f"{clean_text(name)[0]}: its name is no UTF-8; rename it"
