"""Sources of recipe curate: what lies in a folder, in tars, in a table or in a release, listed as a stream.

A listing opens no media. What is in memory is one folder's names, one row group of a table, or one member's header.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from infra.errors import UserError
from infra.opening import filesystem
from infra.secrets import redact
from infra.storage import Storage
from pipelines.curation import Source
from pipelines.policy import refusal
from pipelines.sources import folder, release, table, tars
from pipelines.sources.item import Item, Place

if TYPE_CHECKING:
    from pipelines.spec import Spec

KINDS: dict[str, Callable[[Place], Iterator[Item]]] = {
    "folder": folder.items,
    "tar": tars.items,
    "table": table.items,
    "release": release.items,
}
TABLES = (".csv", ".parquet", ".jsonl", ".ndjson")
PACKED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


def list_items(spec: Spec) -> Iterator[Item]:
    """All that the sources of a spec hold, in their order, without what their shards and limits leave out.

    An item that `policy` does not let be opened comes with an `error`, its uri without its secrets.

    Raises UserError for a source that is missing or holds nothing.
    """
    storage = Storage(".", **spec.output.storage.model_dump())
    for at, source in enumerate(spec.sources):
        place = Place(source, f"sources.{at}", storage, spec.output.storage)
        items = KINDS[kind_of(source, storage)](place)
        first = next(items, None)
        if first is None:
            raise UserError(
                f"{place.key}.path: {redact(source.path)} holds no videos or images; name a place that does"
            )
        mine = (item for item in itertools.chain([first], items) if source.shard is None or in_shard(item.uri, source))
        for item in itertools.islice(mine, source.limit):
            why = refusal(item.uri, spec.policy)
            item = replace(item, uri=redact(item.uri), error=why) if why else item
            tags, licence = (*source.tags, *item.tags), item.licence or source.licence
            yield replace(item, caption_key=source.caption, tags=tags, licence=licence)


def kind_of(source: Source, storage: Storage) -> str:
    """What a source's path is."""
    if source.kind != "auto":
        return source.kind
    name = source.path.lower().partition("?")[0].removesuffix(".gz").removesuffix(".zst")
    if source.path.lower().endswith(PACKED_TARS):
        raise UserError(f"sources: {redact(source.path)} is a packed tar, whose members have no places; unpack it")
    if name.endswith(".tar"):
        return "tar"
    if name.endswith(TABLES):
        return "table"
    fs, path = filesystem(source.path, storage)
    return "release" if fs.exists(posixpath.join(path, "manifest.json")) else "folder"


def in_shard(uri: str, source: Source) -> bool:
    """Whether a uri is of the source's shard: the same on each machine, and whatever else is listed."""
    assert source.shard is not None
    digest = blake2b(uri.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % source.shard.count == source.shard.index
