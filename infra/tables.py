"""The dataset's tables: Delta Lake, read with the schemas of `infra.schema`.

Parts lie flat under the table's folder. What the log does not name does not exist.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from infra.schema import TABLES
from infra.storage import Storage

if TYPE_CHECKING:
    import pyarrow.compute as pc
    import pyarrow.dataset as pds
    from deltalake import DeltaTable

LOG_KEPT = {"delta.logRetentionDuration": "interval 3650 days", "delta.enableExpiredLogCleanup": "false"}


_looking = Lock()
"""Held by who uses a storage's `handles`."""


class Commit(NamedTuple):
    """One version of a table, as its log has it."""

    version: int
    added: tuple[str, ...]
    metadata: dict[str, Any]


class Snapshot(NamedTuple):
    """One version of a table, -1 where there is none, and its live parts."""

    version: int
    files: list[str]


class Table:
    """One table of a dataset. Reading one that was never written gives no rows."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.name = name
        self.schema = TABLES[name]

    def handle(self) -> DeltaTable | None:
        """A fresh look at the table, or None where it does not exist."""
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        uri = self.storage.delta_uri(self.name)
        try:
            return self.storage.patiently(lambda: DeltaTable(uri, storage_options=self.storage.delta_options))
        except TableNotFoundError:
            return None

    def ensure(self) -> DeltaTable:
        """The table, created empty where it does not exist. Two may do so at once."""
        return self.storage.patiently(self._ensure)

    def _ensure(self) -> DeltaTable:
        from deltalake import DeltaTable, Schema
        from deltalake.exceptions import DeltaError

        found = self.handle()
        if found is not None:
            return found
        uri = self.storage.delta_uri(self.name)
        if self.storage.is_local:
            self.storage.fs.makedirs(uri, exist_ok=True)
        try:
            return DeltaTable.create(
                uri,
                schema=Schema.from_arrow(self.schema),
                mode="error",
                configuration=LOG_KEPT,
                storage_options=self.storage.delta_options,
            )
        except (DeltaError, OSError):
            found = self.handle()
            if found is None:
                raise
            return found

    def files(self) -> list[str]:
        """Names of the live parts, relative to the dataset's root."""
        return self.snapshot().files

    def snapshot(self) -> Snapshot:
        """What the table is made of now."""
        with _looking:
            table = self._latest()
            if table is None:
                return Snapshot(-1, [])
            names = [f"{self.name}/{path.rsplit('/', 1)[-1]}" for path in table.file_uris()]
            return Snapshot(table.version(), names)

    def _latest(self) -> DeltaTable | None:
        """The table as it is now. On S3 it is kept, and only what is new of its log is read. It is not for committing:
        nobody else may move the version of a handle that does."""
        credentials = self.storage.credentials
        known, table = self.storage.handles.get(self.name, (credentials, None))
        if table is not None and known == credentials:
            self.storage.patiently(table.update_incremental)
        elif (table := self.handle()) is not None and self.storage.is_s3:
            self.storage.handles[self.name] = credentials, table
        return table

    def dataset(self, files: list[str] | None = None) -> pds.Dataset:
        """The live parts (or the given ones) as a pyarrow dataset of the table's own schema."""
        import pyarrow.dataset as pds

        names = self.files() if files is None else files
        paths = [self.storage.path(name) for name in names]
        if not paths:
            return pds.dataset(pa.table({field.name: pa.array([], field.type) for field in self.schema}, self.schema))
        return pds.dataset(paths, schema=self.schema, filesystem=self.storage.parts, format="parquet")

    def read(self, columns: list[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
        return self.dataset().to_table(columns=columns, filter=filter)

    def batches(
        self, columns: list[str] | None = None, filter: pc.Expression | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Like `read`, a record batch at a time."""
        yield from self.dataset().to_batches(columns=columns, filter=filter)

    def commits_since(self, version: int, until: int) -> Iterator[Commit]:
        """The commits after `version`, up to and including `until`, oldest first."""
        for number in range(version + 1, until + 1):
            text = self.storage.read_bytes(f"{self.name}/_delta_log/{number:020d}.json").decode()
            actions = [json.loads(line) for line in text.splitlines() if line]
            added = tuple(f"{self.name}/{action['add']['path']}" for action in actions if "add" in action)
            metadata: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
            yield Commit(number, added, metadata)


def dataset_exists(storage: Storage) -> bool:
    return storage.exists("dataset.json")


def read_dataset_json(storage: Storage) -> dict[str, Any]:
    return json.loads(storage.read_bytes("dataset.json"))
