"""Commits of `embeddings`: batches have texts in common, and a text is one row."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from infra.commit import Committer, Part, write_part
from infra.schema import EMBEDDINGS
from infra.storage import Storage
from infra.tables import Table


class TextCommits:
    """Parts that wait go into one, in which each text is once; texts that are committed are left out of it."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._run_id = storage, run_id
        self._committer = Committer(Table(storage, "embeddings"), run_id, knows_all=True)
        self._waiting: list[Part] = []
        self._merged: list[Part] = []  # not replaced where its commit fails: only the answer may have been lost
        self._count = 0

    def add(self, part: Part) -> None:
        self._waiting.append(part)

    def commit(self) -> None:
        """Commit what waits. Before the samples that refer to it, so that no row names a text that is not there."""
        if self._waiting:
            self._merged.append(self._merge())
            self._waiting = []
        while self._merged:
            self._committer.commit(self._merged[:1])
            del self._merged[0]

    def _merge(self) -> Part:
        parts = [pq.read_table(io.BytesIO(self._storage.read_bytes(part.path))) for part in self._waiting]
        rows = pa.concat_tables(parts)
        first = {text_id: at for at, text_id in reversed(list(enumerate(rows["text_id"].to_pylist())))}
        self._count += 1
        path = f"embeddings/{self._run_id}-{self._count:08d}-merged.parquet"
        return write_part(self._storage, path, rows.take(sorted(first.values())).cast(EMBEDDINGS))
