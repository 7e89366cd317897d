"""Follows the live runs of a dataset from any machine that sees its storage: looks at it every few seconds until they end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from infra.control import Heartbeat, live_runs
from infra.storage import Storage
from infra.tables import Table

LOOK_SECONDS = 3.0
SUCCESSOR_SECONDS = 40.0
"""After an attempt that failed a run goes on under another id: Prefect waits for up to 20 s before it tries again."""


@dataclass(frozen=True)
class Run:
    """What a live run says of itself; `heard` is how many seconds ago."""

    run_id: str
    host: str
    state: str
    seconds: float
    heard: float
    accepted: int
    rejected: int
    failed: int
    before_done: int
    total: int | None
    rate: float
    accelerator_seconds: float
    last_commit: float | None

    @property
    def done(self) -> int:
        return self.accepted + self.rejected + self.failed

    @property
    def per_accepted(self) -> float | None:
        return self.accelerator_seconds / self.accepted if self.accepted else None

    @property
    def seconds_left(self) -> float | None:
        """Until all that is planned is done; a target or a budget may end the run before."""
        if not self.rate or self.total is None:
            return None
        return max(0.0, (self.total - self.before_done - self.done) / self.rate - self.heard)


@dataclass(frozen=True)
class Look:
    """A dataset at one moment: its live runs, and how many commits its samples have had."""

    runs: tuple[Run, ...]
    commits: int


def look(storage: Storage) -> Look:
    now = time.time()
    runs = tuple(_run(beat, now) for beat in live_runs(storage) if not beat.is_stale)
    return Look(runs, max(0, Table(storage, "samples").snapshot().version))


def follow(storage: Storage, every: float = LOOK_SECONDS) -> Iterator[Look]:
    """Looks, the last of them when no run is live any more; that is the only one where none was."""
    seen: set[str] = set()
    alone_since: float | None = None
    while True:
        found = look(storage)
        yield found
        if found.runs:
            alone_since = None
            seen |= {run.run_id for run in found.runs}
        else:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > SUCCESSOR_SECONDS or not _broke_off(storage, seen):
                return
        time.sleep(every)


def _broke_off(storage: Storage, run_ids: set[str]) -> bool:
    """Whether the newest of these runs failed, so that another may go on for it."""
    if not run_ids:
        return False
    newest = max(run_ids)  # ids sort by time
    where = (pc.field("run_id") == newest) & (pc.field("event") == "ended")
    return any(row["status"] == "failed" for row in Table(storage, "runs").read(["status"], where).to_pylist())


def _run(beat: Heartbeat, now: float) -> Run:
    said: dict[str, Any] = beat.progress  # a run that reads its prompts, and another version, may say less
    return Run(
        run_id=beat.run_id,
        host=beat.host,
        state=beat.state,
        seconds=now - beat.started_at,
        heard=max(0.0, now - beat.renewed_at),
        accepted=said.get("accepted", 0),
        rejected=said.get("rejected", 0),
        failed=said.get("failed", 0),
        before_done=said.get("before_done", 0),
        total=said.get("total"),
        rate=said.get("samples_per_second", 0.0),
        accelerator_seconds=said.get("accelerator_seconds", 0.0),
        last_commit=said.get("last_commit") or None,
    )
