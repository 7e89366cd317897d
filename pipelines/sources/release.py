"""A ditmill release: media of its rows, where they lie in shards, with their captions and tags."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace

import pyarrow.parquet as pq

from infra.errors import UserError
from infra.opening import Member
from infra.secrets import redact
from infra.shard import outside
from pipelines.release import FOLDER, read_release
from pipelines.sources.item import Item, Place

COLUMNS = ["sample_id", "media", "caption", "tags"]


def items(place: Place) -> Iterator[Item]:
    """One item for each of its media that is a video or an image; `extra` has the sample's id."""
    root, found, name = place.source.path.rstrip("/").rpartition(f"/{FOLDER}/")
    if not found or "/" in name:
        raise UserError(
            f"{place.key}.path: expected DATASET/{FOLDER}/NAME of a release, found {redact(place.source.path)}; name one"
        )
    storage = replace(place.storage, root=root)
    for file in read_release(storage, name).files:
        if not file["path"].endswith(".parquet"):
            continue
        data = io.BytesIO(storage.read_bytes(file["path"]))
        for batch in pq.ParquetFile(data).iter_batches(columns=COLUMNS):
            for row in batch.to_pylist():
                for media in row["media"] or ():
                    if media["role"] in ("video", "image") and not outside(media["shard"]):
                        member = Member(f"{root}/{media['shard']}", media["member"], media["offset"], media["nbytes"])
                        extra = {"sample_id": row["sample_id"]}
                        yield Item(member.uri, row["caption"] or "", tags=tuple(row["tags"] or ()), extra=extra)
