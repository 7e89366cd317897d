"""What a run has written and not yet committed, and what failed before it."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from infra.commit import Committer, Part, write_part
from infra.schema import FAILURES
from infra.storage import Storage
from infra.tables import Table
from pipelines.idset import IdSet
from pipelines.text_commits import TextCommits
from stages.batch import STOPPED, Batch
from stages.index import IndexSources


class Commits:
    """What was written and waits for a transaction."""

    def __init__(self, storage: Storage, run_id: str, every: float, with_texts: bool = False) -> None:
        self._committers = {name: Committer(Table(storage, name), run_id) for name in ("samples", "failures")}
        self._texts = TextCommits(storage, run_id) if with_texts else None
        self._waiting: dict[str, list[Part]] = {name: [] for name in self._committers}
        self._every = every
        self._last = time.monotonic()
        self._oldest: float | None = None

    def add(self, parts: list[dict[str, Any]]) -> None:
        for part in parts:
            written = Part(part["path"], part["nbytes"], part["rows"])
            if part["table"] == "embeddings" and self._texts is not None:
                self._texts.add(written)
            else:
                self._waiting[part["table"]].append(written)
        if parts and self._oldest is None:
            self._oldest = time.monotonic()

    def commit(self, force: bool = False) -> int:
        """Commit what waits, if it is time or `force`; the samples and failures that now exist."""
        if not force and time.monotonic() - self._last < self._every:
            return 0
        rows = 0
        if self._texts is not None:
            self._texts.commit()
        for name, parts in self._waiting.items():
            if parts:
                rows += self._committers[name].commit(parts).rows
                self._waiting[name] = []
        self._last, self._oldest = time.monotonic(), None
        return rows

    @property
    def waiting(self) -> int:
        """Samples and failures that wait."""
        return sum(part.rows for parts in self._waiting.values() for part in parts)

    @property
    def lag(self) -> float:
        """Seconds that the oldest of them has waited."""
        return 0.0 if self._oldest is None else time.monotonic() - self._oldest


Retry = Literal["failed", "early"]
"""Which attempts that produced nothing are made again: those that failed, or those that were stopped early."""


def retried(failed: bool, early: bool) -> tuple[Retry, ...]:
    kinds: dict[Retry, bool] = {"failed": failed, "early": early}
    return tuple(kind for kind, wanted in kinds.items() if wanted)


def failures(
    storage: Storage, rows: pc.Expression | None, retry: Collection[Retry] = ()
) -> tuple[IdSet, dict[str, int]]:
    """Samples whose last attempt produced nothing, and of those that are to be tried again their next attempt's number.

    Sources that failed are no samples.
    """
    table = Table(storage, "failures")
    samples = pc.field("stage") != IndexSources.name
    rows = samples if rows is None else rows & samples
    if not retry:
        return IdSet(batch.column("sample_id") for batch in table.batches(["sample_id"], rows)), {}
    last: dict[str, tuple[int, str]] = {}
    for batch in table.batches(["sample_id", "attempt", "error_type"], rows):
        for row in batch.to_pylist():
            attempt = max(last.get(row["sample_id"], (0, "")), (row["attempt"], row["error_type"]))
            last[row["sample_id"]] = attempt
    again = {
        sample_id: attempt + 1
        for sample_id, (attempt, kind) in last.items()
        if ("early" if kind == STOPPED else "failed") in retry
    }
    left = [sample_id for sample_id in last if sample_id not in again]
    return IdSet([pa.array(left, pa.string())] if left else []), again


def worker_died(storage: Storage, run_id: str, batch: Batch) -> dict[str, Any]:
    """A failures part for a sample that took its worker with it each time."""
    row = {
        "sample_id": batch["sample_id"][0],
        "attempt": int(batch["attempt"][0]),
        "prompt_id": batch["prompt_id"][0],
        "prompt": batch["prompt"][0],
        "sample_index": int(batch["sample_index"][0]),
        "stage": "",
        "error_type": "worker_died",
        "error": "the worker process died each time it had this sample, alone and in its batch (out of memory, or a crash)",
        "cost": [],
        "run_id": run_id,
        "node": socket.gethostname(),
        "created_at": datetime.now(UTC),
    }
    part = write_part(
        storage, f"failures/{run_id}-died-{row['sample_id']}.parquet", pa.Table.from_pylist([row], FAILURES)
    )
    return {"table": "failures", "path": part.path, "nbytes": part.nbytes, "rows": part.rows}
