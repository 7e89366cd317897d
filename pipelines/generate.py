"""One run of the graph: feed it, commit what comes out while it goes on, and stop it cleanly.

The driver is the run's one committer. Everything it knows of progress is in the tables; its own memory holds the ids that
are done (16 bytes each) and what is in flight.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from infra.commit import Committer, Part, write_part
from infra.control import Pulse, beating
from infra.errors import UserError
from infra.schema import FAILURES
from infra.storage import Storage
from infra.tables import Table
from infra.telemetry import log
from pipelines.decisions import count_accepted
from pipelines.enumeration import Batches, Enumeration
from pipelines.feed import Feeder
from pipelines.graph import GraphBroke, Group, in_flight, results
from pipelines.idset import IdSet
from pipelines.ledger import Ledger, rows_cost
from pipelines.spec import Budget, Target
from stages.batch import Batch, WorldFault, size, take

MOST_LOST = 8
"""Batches that may kill their workers, beside one for each that comes out, before the blame is on the world."""


@dataclass(frozen=True)
class Job:
    """What to generate and where."""

    storage: Storage
    run_id: str
    enumeration: Enumeration
    batch_size: int
    seed: int
    target: Target
    budget: Budget
    commit_every: float
    retry_failed: bool = False


@dataclass
class Progress:
    """Counts of this run (`done` ones) and of the dataset before it."""

    started: float = field(default_factory=time.time)
    before_accepted: int = 0
    before_done: int = 0
    total: int = 0
    launched: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    committed: int = 0
    nbytes: int = 0
    first_result: float = 0.0
    first_done: int = 0
    last_result: float = 0.0

    @property
    def done(self) -> int:
        return self.accepted + self.rejected + self.failed

    @property
    def rate(self) -> float:
        """Samples a second since the first batch came out; 0 before there is a second one."""
        seconds = self.last_result - self.first_result
        return (self.done - self.first_done) / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status`: reached, exhausted, budget or stopped."""

    status: str
    planned_through: int
    progress: Progress
    allocated: float
    overhead: dict[str, float]
    reproducible: str
    actors: tuple[dict[str, Any], ...] = ()
    """What each actor says of itself (see stages.actor.LedgerEntry)."""


class Commits:
    """What was written and waits for a transaction."""

    def __init__(self, storage: Storage, run_id: str, every: float) -> None:
        self._committers = {name: Committer(Table(storage, name), run_id) for name in ("samples", "failures")}
        self._waiting: dict[str, list[Part]] = {name: [] for name in self._committers}
        self._every = every
        self._last = time.monotonic()

    def add(self, parts: list[dict[str, Any]]) -> None:
        for part in parts:
            self._waiting[part["table"]].append(Part(part["path"], part["nbytes"], part["rows"]))

    def commit(self, force: bool = False) -> int:
        """Commit what waits, if it is time or `force`; the rows that now exist."""
        if not force and time.monotonic() - self._last < self._every:
            return 0
        rows = 0
        for name, parts in self._waiting.items():
            if parts:
                rows += self._committers[name].commit(parts).rows
                self._waiting[name] = []
        self._last = time.monotonic()
        return rows


class StopRequest:
    """Set by a signal, a budget or `ditmill stop`: hand out no more, finish what is under way."""

    def __init__(self) -> None:
        self.reason = ""

    def set(self, reason: str) -> None:
        self.reason = self.reason or reason


def generate(
    job: Job,
    groups: Callable[[], tuple[Group, ...]],
    stop: StopRequest,
    report: Callable[[Progress], None],
) -> Outcome:
    """Make the samples that the tables lack.

    Args:
        job: what to generate.
        groups: the actor groups, asked for only when there is something to do (a cluster is started for it).
        stop: set it to end early.
        report: called with the counts a few times a second.
    """
    commits = Commits(job.storage, job.run_id, job.commit_every)
    progress = Progress(total=len(job.enumeration))
    samples = Table(job.storage, "samples")
    done = IdSet(batch.column("sample_id") for batch in samples.batches(["sample_id"]))
    progress.before_accepted = count_accepted(job.storage)
    failed, attempts = _failures(job)
    progress.before_done = len(done) + len(failed)
    limit = job.target.samples
    if limit is not None:
        progress.total = min(progress.total, limit)

    def is_done(ids: list[str]) -> np.ndarray:
        return done.contains(ids) | failed.contains(ids)

    batches = Batches(job.enumeration, is_done, job.batch_size, attempts, job.seed, limit)
    ledger = Ledger()
    run = _Run(job, commits, progress, ledger, stop, report)
    first = iter(batches)
    if run.target_reached():
        return Outcome("reached", 0, progress, 0.0, {}, "")
    ready = next(first, None)
    if ready is None:
        return Outcome("exhausted", batches.planned_through, progress, 0.0, {}, "")
    with beating(Pulse(job.storage, job.run_id), "running", run.counts, lambda: stop.set("stopped")):
        run.make(itertools.chain([ready], first), groups())
        progress.committed += commits.commit(force=True)
    ended = time.time()
    status = stop.reason or ("reached" if run.target_reached() else "exhausted")
    return Outcome(
        status,
        # The first batch was taken before anything was started.
        batches.planned_through if progress.launched else 0,
        progress,
        ledger.allocated(ended),
        ledger.overhead(ended, rows_cost(job.storage, job.run_id)),
        ledger.reproducible,
        ledger.entries,
    )


class _Run:
    """State of one run's loop."""

    def __init__(
        self,
        job: Job,
        commits: Commits,
        progress: Progress,
        ledger: Ledger,
        stop: StopRequest,
        report: Callable[[Progress], None],
    ) -> None:
        self.job, self.commits, self.progress, self.ledger = job, commits, progress, ledger
        self.stop, self.report = stop, report
        self._came = 0  # batches
        self._deadline = parse_deadline(job.budget.deadline)

    def target_reached(self) -> bool:
        wanted = self.job.target.accepted
        return wanted is not None and self.progress.before_accepted + self.progress.accepted >= wanted

    def make(self, batches: Iterator[Batch], groups: tuple[Group, ...]) -> None:
        """Take `batches` through the graph, to their rows. A graph that breaks is started again while there is progress."""
        broke = True
        while broke:
            lost, broke = self.drive(batches, groups, in_flight(groups))
            if lost:
                log().warning("batches were lost with their workers; each is tried again by itself", batches=len(lost))
            # Most of them only stood beside the one that killed the worker: each gets the graph to itself.
            lost, _ = self.drive(iter(lost), groups, 1, to_the_end=True)
            singles = (take(batch, np.array([at])) for batch in lost for at in range(size(batch)))
            died, _ = self.drive(singles, groups, 1, to_the_end=True) if lost else ([], False)
            for batch in died:
                log().warning("sample failed", stage="", sample_id=batch["sample_id"][0], error_type="worker_died")
                self.commits.add([_worker_died(self.job, batch)])
                self.progress.failed += 1

    def drive(
        self, batches: Iterator[Batch], groups: tuple[Group, ...], at_once: int, to_the_end: bool = False
    ) -> tuple[list[Batch], bool]:
        """Take `batches` through the graph, `at_once` at a time.

        Those that did not come out, most of them because they killed their worker, and whether the graph broke.
        WorldFault if nothing came out of a graph that broke, or if more batches are lost than come out.
        `to_the_end`: whatever asks for an end, take all of them; a graph that breaks is then always a WorldFault.
        """
        if not to_the_end and (self.stop.reason or self.target_reached()):
            return [], False
        first = next(batches, None)
        if first is None:
            return [], False
        came, batches = self._came, itertools.chain([first], batches)
        feeder = Feeder(at_once)
        context = {"run_id": self.job.run_id}
        try:
            with contextlib.closing(results(feeder, groups, context, time.time())) as out:
                for batch in out:
                    self._take(feeder, batch)
                    self._tick()
                    if feeder.lost > MOST_LOST + self._came:
                        raise WorldFault(f"{feeder.lost} batches killed their workers and {self._came} came out")
                    self._feed(feeder, batches, to_the_end)
            if not feeder.closed:
                raise WorldFault("the graph ended by itself: its mailbox or the whole Ray session is gone")
        except GraphBroke as fault:
            self._save()
            if self._came == came or to_the_end:
                raise
            log().warning("the graph broke and is started again", error=str(fault))
            return feeder.unfinished(), True
        except BaseException:
            self._save()
            raise
        finally:
            feeder.close()
            self.ledger.release(time.time())
        return feeder.unfinished(), False

    def _save(self) -> None:
        """What is written and whole is not lost with the run."""
        try:
            self.progress.committed += self.commits.commit(force=True)
        except Exception as error:
            log().warning("could not commit", error=f"{type(error).__name__}: {error}")

    def _feed(self, feeder: Feeder, batches: Iterator[Batch], to_the_end: bool) -> None:
        while feeder.has_room:
            if not to_the_end:
                if self.stop.reason or self.target_reached():
                    feeder.close()
                    return
                if feeder.samples_in_flight and self._enough_under_way(feeder.samples_in_flight):
                    return
            batch = next(batches, None)
            if batch is None:
                feeder.close()
                return
            self._put(feeder, batch)

    def _put(self, feeder: Feeder, batch: Batch) -> None:
        feeder.put(batch)
        self.progress.launched += size(batch)

    def _enough_under_way(self, samples: int) -> bool:
        """Whether what is in flight will probably reach the target."""
        wanted = self.job.target.accepted
        if wanted is None:
            return False
        rate = (self.progress.accepted + 1) / (self.progress.done + 2)
        return self.progress.before_accepted + self.progress.accepted + rate * samples >= wanted

    def _take(self, feeder: Feeder, batch: Batch) -> None:
        if "fault" in batch:
            kind, _, message = str(batch["fault"][0]).partition(": ")
            raise UserError(message) if kind == "user" else WorldFault(message)
        if "result" not in batch:
            return
        result = json.loads(batch["result"][0])
        if not feeder.done(result["batch_index"]):
            return
        self._came += 1
        self.progress.accepted += result["accepted"]
        self.progress.rejected += result["rejected"]
        self.progress.failed += result["failed"]
        self.progress.last_result = time.time()
        if not self.progress.first_result:
            self.progress.first_result, self.progress.first_done = self.progress.last_result, self.progress.done
        self.progress.nbytes += result["media_nbytes"] + sum(part["nbytes"] for part in result["parts"])
        self.ledger.add(result["ledger"])
        self.commits.add(result["parts"])

    def _tick(self) -> None:
        self.progress.committed += self.commits.commit()
        self.report(self.progress)
        budget = self.job.budget
        now = time.time()
        if budget.bytes is not None and self.progress.nbytes >= budget.bytes:
            self.stop.set("budget")
        if self._deadline is not None and now >= self._deadline:
            self.stop.set("budget")
        if budget.accelerator_seconds is not None and self.ledger.allocated(now) >= budget.accelerator_seconds:
            self.stop.set("budget")

    def counts(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "accepted": progress.accepted,
            "rejected": progress.rejected,
            "failed": progress.failed,
            "committed": progress.committed,
            "launched": progress.launched,
            "total": progress.total,
        }


def _failures(job: Job) -> tuple[IdSet, dict[str, int]]:
    """Samples that failed before, and their next attempt's number where failures are retried."""
    table = Table(job.storage, "failures")
    if not job.retry_failed:
        return IdSet(batch.column("sample_id") for batch in table.batches(["sample_id"])), {}
    attempts: dict[str, int] = {}
    for batch in table.batches(["sample_id", "attempt"]):
        for sample_id, attempt in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
            attempts[sample_id] = max(attempts.get(sample_id, 1), attempt + 1)
    return IdSet([]), attempts


def _worker_died(job: Job, batch: Batch) -> dict[str, Any]:
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
        "run_id": job.run_id,
        "node": socket.gethostname(),
        "created_at": datetime.now(UTC),
    }
    part = write_part(
        job.storage, f"failures/{job.run_id}-died-{row['sample_id']}.parquet", pa.Table.from_pylist([row], FAILURES)
    )
    return {"table": "failures", "path": part.path, "nbytes": part.nbytes, "rows": part.rows}


def parse_deadline(text: str | None) -> float | None:
    """Unix seconds of an ISO 8601 time or of a duration from now, such as 90m, 2h, 30s or 1d."""
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if text[-1:] in units and text[:-1].replace(".", "", 1).isdigit():
        return time.time() + float(text[:-1]) * units[text[-1]]
    try:
        return datetime.fromisoformat(text).astimezone(UTC).timestamp()
    except ValueError as error:
        raise UserError(
            f"budget.deadline: expected an ISO 8601 time or a duration such as 90m, found {text!r}"
        ) from error
