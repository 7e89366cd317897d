"""Live runs: heartbeats, requests to stop, and the sweeping of what a dead run left.

A run renews `control/<run_id>.json` every 15 seconds and is stale after 60, or at once when it ran on this very machine
and its process is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from infra.commit import fence
from infra.schema import TABLES
from infra.storage import Storage
from infra.tables import Table
from infra.telemetry import log

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0
LOOK_SECONDS = 2.0
SHARDS = ("media", "rejected", "text")
"""Folders of tars: <folder>/<run_id>/*.tar."""


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
    machine: str = ""

    @property
    def is_stale(self) -> bool:
        if self.machine and self.machine == _machine() and _process_started(self.pid) != self.pid_started:
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
        heartbeat = Heartbeat(
            run_id=self.run_id,
            host=socket.gethostname(),
            pid=pid,
            pid_started=_process_started(pid),
            started_at=self._started,
            renewed_at=now,
            state=state,
            progress=progress,
            machine=_machine(),
        )
        self._storage.write_bytes(_heartbeat_name(self.run_id), json.dumps(asdict(heartbeat)).encode())

    def stop_requested(self) -> bool:
        return self._storage.exists(_stop_name(self.run_id))

    def end(self) -> None:
        for name in (_heartbeat_name(self.run_id), _stop_name(self.run_id)):
            self._storage.delete(name)


@contextlib.contextmanager
def beating(
    pulse: Pulse, state: str, progress: Callable[[], dict[str, Any]], on_stop: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Renew the heartbeat from a thread, also while models load or a commit takes long; `on_stop` when asked to stop."""
    ending = threading.Event()

    def beat() -> None:
        while True:
            try:
                pulse.beat(state, progress())
                if pulse.stop_requested():
                    on_stop()
            except OSError as error:
                log().warning("heartbeat failed", run_id=pulse.run_id, error=str(error))
            if ending.wait(LOOK_SECONDS):
                return

    pulse.beat(state, progress(), force=True)  # before anything is written that a sweep could find
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def live_runs(storage: Storage) -> list[Heartbeat]:
    """Heartbeats of the runs that have not ended, stale ones included."""
    beats = []
    for name in storage.files("control", recursive=False):
        if name.endswith(".json"):
            try:
                said = json.loads(storage.read_bytes(name))
            except FileNotFoundError:
                continue  # it ended between the listing and the look
            known = {field.name for field in fields(Heartbeat)}  # another version may say more
            beats.append(Heartbeat(**{key: value for key, value in said.items() if key in known}))
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
    """Parts, shards and half-written files (of one run, or of all) that no transaction refers to."""
    # Listing first, log second: what is committed in between is then in the log.
    parts = {table: list(storage.files(table, recursive=False)) for table in TABLES}
    shards = [name for folder in SHARDS for name in storage.files(f"{folder}/{run_id}" if run_id else folder)]
    found: list[str] = []
    for table, names in parts.items():
        if run_id:
            names = [name for name in names if name.startswith(f"{table}/{run_id}-")]
        live = set(Table(storage, table).files()) if names else set()
        found += [name for name in names if name not in live]
    used = _shards_in_use(storage, run_id) if shards else set()
    return found + [name for name in shards if name not in used]


def _shards_in_use(storage: Storage, run_id: str | None) -> set[str]:
    used: set[str] = set()
    where = None if run_id is None else pc.field("run_id") == run_id
    for table, columns in (("samples", ["media", "tensors"]), ("embeddings", ["tensors"])):
        for batch in Table(storage, table).batches(columns, where):
            for column in columns:
                shards = batch.column(column).flatten().field("shard")
                used.update(shards.unique().to_pylist())
    return used


def _heartbeat_name(run_id: str) -> str:
    return f"control/{run_id}.json"


def _stop_name(run_id: str) -> str:
    return f"control/{run_id}.stop"


def _machine() -> str:
    """Where process numbers mean the same: this boot of this machine, and its container; empty where that is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_started(pid: int) -> str:
    """Something that tells this process from a later one with the same number; empty where there is none (any more)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, IndexError):
        return ""
    return "" if state in ("Z", "X") else rest[18]  # killed, and its parent has not looked yet
