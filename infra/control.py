"""Live runs: heartbeats, requests to stop, and the sweeping of what a dead run left.

A run renews `control/<run_id>.json` every 15 seconds and is stale after 60, or at once when it ran on this very host and
its process is gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from infra.commit import fence
from infra.schema import TABLES
from infra.storage import Storage
from infra.tables import Table

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Heartbeat:
    """What a live run says of itself."""

    run_id: str
    host: str
    pid: int
    pid_started: str
    started_at: float
    renewed_at: float
    state: str
    progress: dict[str, Any]

    @property
    def is_stale(self) -> bool:
        if self.host == _host() and _process_started(self.pid) != self.pid_started:
            return True
        return time.time() - self.renewed_at > STALE_SECONDS


class Pulse:
    """The heartbeat of this run."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage = storage
        self.run_id = run_id
        self._started = time.time()
        self._last = 0.0

    def beat(self, state: str, progress: dict[str, Any], force: bool = False) -> None:
        """Renew, unless that was done a moment ago."""
        now = time.time()
        if not force and now - self._last < RENEW_SECONDS:
            return
        self._last = now
        pid = os.getpid()
        heartbeat = Heartbeat(self.run_id, _host(), pid, _process_started(pid), self._started, now, state, progress)
        self._storage.write_bytes(_heartbeat_name(self.run_id), json.dumps(asdict(heartbeat)).encode())

    def stop_requested(self) -> bool:
        return self._storage.exists(_stop_name(self.run_id))

    def end(self) -> None:
        for name in (_heartbeat_name(self.run_id), _stop_name(self.run_id)):
            if self._storage.exists(name):
                self._storage.delete(name)


def live_runs(storage: Storage) -> list[Heartbeat]:
    """Heartbeats of the runs that have not ended, stale ones included."""
    beats = []
    for name in storage.files("control", recursive=False):
        if name.endswith(".json"):
            try:
                beats.append(Heartbeat(**json.loads(storage.read_bytes(name))))
            except FileNotFoundError:
                continue  # it ended between the listing and the look
    return sorted(beats, key=lambda beat: beat.started_at)


def request_stop(storage: Storage, run_id: str) -> None:
    storage.write_bytes(_stop_name(run_id), b"")


def sweep(storage: Storage, run_id: str) -> list[str]:
    """Delete what the ended run `run_id` wrote and never committed."""
    removed = uncommitted_files(storage, run_id)
    for name in removed:
        storage.delete(name)
    Pulse(storage, run_id).end()
    return removed


def sweep_stale(storage: Storage, but: str) -> dict[str, list[str]]:
    """Fence and sweep every stale run except `but`: it may only seem dead, and must not commit what is deleted here."""
    swept = {}
    for beat in live_runs(storage):
        if beat.is_stale and beat.run_id != but:
            for name in TABLES:
                fence(Table(storage, name), beat.run_id)
            swept[beat.run_id] = sweep(storage, beat.run_id)
    return swept


def uncommitted_files(storage: Storage, run_id: str | None = None) -> list[str]:
    """Parts and shards (of one run, or of all) that no transaction refers to."""
    found: list[str] = []
    for table in TABLES:
        live = set(Table(storage, table).files())
        for name in storage.files(table, recursive=False):
            base = name.rsplit("/", 1)[-1]
            ours = run_id is None or base.startswith(f"{run_id}-")
            if base.endswith(".parquet") and "_delta_log" not in name and ours and name not in live:
                found.append(name)
    used = _shards_in_use(storage, run_id)
    for folder in ("media", "rejected"):
        base = f"{folder}/{run_id}" if run_id else folder
        found += [name for name in storage.files(base) if name not in used]
    return found


def _shards_in_use(storage: Storage, run_id: str | None) -> set[str]:
    used: set[str] = set()
    where = None if run_id is None else pc.field("run_id") == run_id
    for batch in Table(storage, "samples").batches(["media", "tensors"], where):
        for column in ("media", "tensors"):
            shards = batch.column(column).flatten().field("shard")
            used.update(shards.unique().to_pylist())
    return used


def _heartbeat_name(run_id: str) -> str:
    return f"control/{run_id}.json"


def _stop_name(run_id: str) -> str:
    return f"control/{run_id}.stop"


def _host() -> str:
    return socket.gethostname()


def _process_started(pid: int) -> str:
    """Something that tells this process from a later one with the same number; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
