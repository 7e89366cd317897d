"""What a listing gives: one file of a source, unopened."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from infra.storage import Storage
from pipelines.curation import Source

if TYPE_CHECKING:
    from pipelines.spec import Storage as StorageSettings

VIDEOS = frozenset({"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "wmv", "flv", "gif"})
IMAGES = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"})
SIDECARS = ("txt", "json")


@dataclass(frozen=True, slots=True)
class Item:
    """One file that may hold media.

    `sidecars` are uris of files beside it that may say a caption, a .json at `caption_key`; `error`, where there is one, says
    why it is not opened.
    """

    uri: str
    caption: str = ""
    sidecars: tuple[str, ...] = ()
    caption_key: str = ""
    tags: tuple[str, ...] = ()
    licence: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A source, the key of the spec that it stands at, and how S3 is reached."""

    source: Source
    key: str
    storage: Storage
    settings: StorageSettings


def suffix_of(name: str) -> str:
    """What is after a name's last dot, in lower case."""
    return posixpath.splitext(name)[1][1:].lower()


def is_media(name: str) -> bool:
    return suffix_of(name) in VIDEOS | IMAGES
