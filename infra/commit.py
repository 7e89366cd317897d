"""Exactly-once appends: every commit is a compare-and-swap, and the first commit of a key wins.

Delta's own append never conflicts, accepts a repeated application transaction and even a missing file. So a committer looks
at the versions it has not seen, drops rows whose key they brought (rewriting the part), and commits with no retry of
Delta's own; when somebody was quicker it looks again. What no transaction refers to does not exist, so a committer that
dies leaves nothing but files to sweep.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.schema import KEYS
from infra.storage import DELTA_ATTEMPTS, Storage, pauses
from infra.tables import Table

if TYPE_CHECKING:
    from deltalake import DeltaTable

RUN = "ditmill.run_id"
FENCE = "ditmill.fence"
MAX_ROUNDS = 100

Key = tuple[Any, ...]


class FencedError(Exception):
    """Another run took this one for dead and swept its uncommitted files: it must end, and can be started again."""


@dataclass(frozen=True)
class Part:
    """A closed Parquet file under a table's folder that no transaction refers to yet."""

    path: str
    nbytes: int
    rows: int


@dataclass(frozen=True)
class Committed:
    """What a commit did: rows that now exist, and rows dropped because their key was already committed."""

    version: int
    rows: int
    dropped: int


def write_part(storage: Storage, path: str, rows: pa.Table) -> Part:
    """Write `rows` as a Parquet file that can be committed later."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    data = sink.getvalue()
    storage.write_bytes(path, data)
    return Part(path, len(data), rows.num_rows)


class Committer:
    """Appends to one table for one run.

    Open it before reading what the table holds and before writing a part: rows that others commit after its opening are
    found by it, and so is a fence. Earlier rows, and those of its own earlier parts, are the caller's to leave out, unless
    `knows_all`: then all keys, some 150 bytes each, are held here.
    """

    def __init__(self, table: Table, run_id: str, knows_all: bool = False) -> None:
        self.table = table
        self.run_id = run_id
        self._credentials = table.storage.credentials
        self._handle: DeltaTable = table.ensure()
        self._seen: int = self._handle.version()
        self._knows_all = knows_all
        # After the handle: what others commit in between is then known twice, not never.
        self._taken: set[Key] = _keys(table, table.files()) if knows_all else set()
        self._ours: dict[str, int | None] = {}  # path of a part as it was given -> its rows, None for all of them
        self._rewritten: dict[str, tuple[str, int]] = {}  # path of a rewritten part -> the given path, and rows left

    def commit(self, parts: list[Part]) -> Committed:
        """Append `parts` in one transaction. Safe to call again with parts that may have been committed before.

        Raises FencedError where this run was taken for dead, FileNotFoundError where a part is not there or is not whole
        (readers would stumble over it ever after), TimeoutError where others are always quicker.
        """
        from deltalake.exceptions import CommitFailedError, DeltaError

        rows = sum(part.rows for part in parts)
        lost = pauses(1 if self.table.storage.is_local else DELTA_ATTEMPTS)
        for attempt in range(MAX_ROUNDS):
            self._look()
            new = [part for part in parts if part.path not in self._ours]
            ready = [kept for part in new if (kept := self._without_taken(part)) is not None]
            if not ready:
                break
            _check_there(self.table.storage, ready)
            try:
                _append(self._handle, ready, {RUN: self.run_id})
            except CommitFailedError:
                time.sleep(min(1.0, 0.01 * 2**attempt))
                continue
            except (DeltaError, OSError):
                # The answer may have been lost after the commit was made: look before deciding. To make it again is safe,
                # also where the first request still lands: only one of the two can be that version.
                self._look()
                if not all(self._given(part.path) in self._ours for part in ready):
                    if (pause := next(lost, None)) is None:
                        raise
                    time.sleep(pause)
                    continue
            self._note(part.path for part in ready)
            break
        else:
            raise TimeoutError(f"{self.table.name}: {MAX_ROUNDS} commits in a row were overtaken by other writers")
        committed = 0
        for part in parts:
            left = self._ours.get(part.path, 0)
            committed += part.rows if left is None else left
        return Committed(self._handle.version(), committed, rows - committed)

    def _look(self) -> None:
        """Take in the versions since the last look."""
        storage = self.table.storage
        if self._credentials != (now := storage.credentials):  # a handle keeps those it was opened with
            self._credentials, self._handle = now, self.table.ensure()
        storage.patiently(self._handle.update_incremental)
        latest = self._handle.version()
        for commit in self.table.commits_since(self._seen, latest):
            if commit.metadata.get(FENCE) == self.run_id:
                raise FencedError(
                    f"run {self.run_id} was taken for dead and its uncommitted files were removed; run the command again"
                )
            if commit.metadata.get(RUN) == self.run_id:
                self._note(commit.added)
            elif commit.added:
                self._taken.update(_keys(self.table, list(commit.added)))
        self._seen = latest

    def _note(self, paths: Iterable[str]) -> None:
        """These parts are committed."""
        paths = list(paths)
        if self._knows_all:
            self._taken.update(_keys(self.table, paths))
        for path in paths:
            given, rows = self._rewritten.get(path, (path, None))
            self._ours[given] = rows

    def _given(self, path: str) -> str:
        return self._rewritten[path][0] if path in self._rewritten else path

    def _without_taken(self, part: Part) -> Part | None:
        """The part without rows whose key is committed: itself where there are none, None where nothing is left."""
        if not self._taken:
            return part
        file = io.BytesIO(self.table.storage.read_bytes(part.path))
        names = list(KEYS[self.table.name])
        keep = [key not in self._taken for key in _rows(pq.read_table(file, columns=names), names)]
        if all(keep):
            return part
        if not any(keep):
            return None
        left = pq.read_table(file, schema=self.table.schema).filter(pa.array(keep))
        stem = part.path.removesuffix(".parquet")
        written = write_part(self.table.storage, f"{stem}-v{self._seen}.parquet", left)
        self._rewritten[written.path] = (part.path, written.rows)
        return written


def _rows(table: pa.Table, names: list[str]) -> Iterator[Key]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _check_there(storage: Storage, parts: list[Part]) -> None:
    """Delta commits the name of a missing file without a word."""
    for part, nbytes in zip(parts, storage.sizes([part.path for part in parts]), strict=True):
        if nbytes != part.nbytes:
            raise FileNotFoundError(f"{part.path}: expected {part.nbytes} bytes, found {nbytes}; it was written over")


def _keys(table: Table, files: list[str]) -> set[Key]:
    names = list(KEYS[table.name])
    return set(_rows(table.dataset(files).to_table(columns=names), names))


def _append(handle: DeltaTable, parts: list[Part], metadata: dict[str, Any]) -> None:
    from deltalake import CommitProperties
    from deltalake.transaction import AddAction

    now = int(time.time() * 1000)
    actions = [
        AddAction(part.path.rsplit("/", 1)[-1], part.nbytes, {}, now, True, json.dumps({"numRecords": part.rows}))
        for part in parts
    ]
    handle.create_write_transaction(
        actions, "append", handle.schema(), commit_properties=CommitProperties(metadata, max_commit_retries=0)
    )


def fence(table: Table, run_id: str) -> None:
    """Make sure that nothing `run_id` wrote so far can be committed to this table any more."""
    from deltalake.exceptions import CommitFailedError

    for attempt in range(MAX_ROUNDS):
        handle = table.handle()
        if handle is None:
            return
        try:
            # Where an answer is lost there may be two fences: one holds as well as two.
            table.storage.patiently(partial(_append, handle, [], {FENCE: run_id}))
            return
        except CommitFailedError:
            time.sleep(min(1.0, 0.01 * 2**attempt))
    raise TimeoutError(f"{table.name}: could not fence {run_id}; other writers were always quicker")
