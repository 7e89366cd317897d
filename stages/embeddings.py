"""The texts of a batch as rows of `embeddings`: each distinct one once, those that are committed already not again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from infra.shard import read_arrays, read_metadata
from infra.storage import Storage
from infra.tables import Table
from models.text import EMBEDS
from stages.batch import Batch, size
from stages.tensors import Compression, Member, Row, member_of, reference

LOOK_SECONDS = 30.0
"""Between two looks at what others have committed."""
REMEMBERED = 1 << 18
"""Ids that a process remembers, of 16 bytes each; a text beyond them is written again and dropped by its commit."""


@dataclass(frozen=True)
class Texts:
    """Rows of `embeddings` without shards and places, and the members that hold them."""

    rows: list[Row]
    members: list[Member]


def texts_of(batch: Batch, storage: Storage, run_id: str, now: datetime, dtype: str, compression: Compression) -> Texts:
    """Texts of the samples of a batch that have not failed.

    Only what is committed counts as known: what this process has written may never come to be.
    """
    found: dict[str, tuple[str, bytes, bool]] = {}
    for name, negative in (("text", False), ("negative_text", True)):
        prompts = batch["negative_prompt" if negative else "prompt"]
        for at in range(size(batch)):
            text_id = str(batch[f"{name}_id"][at] or "") if f"{name}_id" in batch else ""
            if text_id and not batch["error_type"][at]:
                found[text_id] = (str(prompts[at] or ""), batch[name][at], negative)
    new = committed_texts(storage).without_known(sorted(found))
    rows, members = [], []
    for text_id in new:
        text, data, negative = found[text_id]
        member = member_of(text_id, data, compression)
        row = _row(text_id, text, data, negative) | {"run_id": run_id, "created_at": now}
        row["tensors"] = [
            reference("text_embeddings", member, dtype, (row["tokens"], row.pop("width")), "tokens width")
        ]
        rows.append(row)
        members.append(member)
    return Texts(rows, members)


def _row(text_id: str, text: str, data: bytes, negative: bool) -> Row:
    encoding = json.loads(read_metadata(data)["encoding"])
    embeds = read_arrays(data)[EMBEDS]
    return {
        "text_id": text_id,
        "text": text,
        "negative": negative,
        "encoder_sha256": encoding["encoder_sha256"],
        "family": encoding["family"],
        "max_sequence_length": encoding["max_sequence_length"],
        "tokens": len(embeds),
        "width": embeds.shape[1],
        "extra_json": json.dumps({"dtype": encoding["dtype"]}),
    }


class CommittedTexts:
    """Ids of the rows of `embeddings`, as far as this process has looked."""

    def __init__(self, storage: Storage) -> None:
        self._table = Table(storage, "embeddings")
        self._files: set[str] = set()
        self._known: set[bytes] = set()
        self._looked = float("-inf")

    def without_known(self, ids: list[str]) -> list[str]:
        """Those of `ids` that are not committed, or were not a moment ago."""
        new = self._unknown(ids)
        if new and time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
            new = self._unknown(new)
        return new

    def _unknown(self, ids: list[str]) -> list[str]:
        return [text_id for text_id in ids if bytes.fromhex(text_id) not in self._known]

    def _look(self) -> None:
        files = [name for name in self._table.files() if name not in self._files]
        for text_id in self._ids(files):
            if len(self._known) >= REMEMBERED:
                break
            self._known.add(bytes.fromhex(text_id))
        self._files.update(files)
        self._looked = time.monotonic()

    def _ids(self, files: list[str]) -> Iterator[str]:
        for batch in self._table.dataset(files).to_batches(columns=["text_id"]) if files else ():
            yield from batch.column("text_id").to_pylist()


_committed: dict[Storage, CommittedTexts] = {}


def committed_texts(storage: Storage) -> CommittedTexts:
    """Of a dataset, one a process."""
    return _committed.setdefault(storage, CommittedTexts(storage))
