"""One run of the graph: feed it, commit what comes out while it goes on, and stop it cleanly.

The driver is the run's one committer. Everything it knows of progress is in the tables; its own memory holds the ids that
are done (16 bytes each) and what is in flight.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from infra.control import Pulse, beating
from infra.errors import UserError
from infra.quarantine import hold
from infra.storage import Storage
from infra.tables import Table
from infra.telemetry import log
from pipelines.commits import Commits, Retry, failures, worker_died
from pipelines.decisions import count_accepted
from pipelines.enumeration import Batches, Enumeration
from pipelines.feed import Feeder
from pipelines.graph import GraphBroke, results
from pipelines.guards import Breach, Guards, Window
from pipelines.idset import IdSet
from pipelines.ledger import Ledger, rows_cost
from pipelines.observe import Observer
from pipelines.placement import Group, in_flight
from pipelines.spec import Budget, Target
from stages.batch import Batch, WorldFault, size, take
from stages.canary import canary_batch

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
    retry: Collection[Retry] = ()
    hand_out: Callable[[Iterator[Batch]], Iterator[Batch]] = iter  # what batches go through just before
    guards: Guards = field(default_factory=Guards)
    rows: pc.Expression | None = None
    """What tells rows that count from others; None where all of the dataset's do."""
    name: str = ""  # of the dataset, for those who watch
    with_texts: bool = False  # embeddings of texts are kept


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
    last_commit: float = 0.0
    allocated: float = 0.0
    """Accelerator-seconds held so far."""

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
    """How a run ended. `status`: reached, exhausted, budget, stopped, or paused by its guards, for the reason `why`."""

    status: str
    planned_through: int
    progress: Progress
    allocated: float
    overhead: dict[str, float]
    reproducible: str
    actors: tuple[dict[str, Any], ...] = ()
    """What each actor says of itself (see stages.actor.LedgerEntry)."""
    why: str = ""
    taken_out: dict[str, str] = field(default_factory=dict)
    """Devices that the run went on without, and why."""


class StopRequest:
    """Set by a signal, a budget, a guard or `ditmill stop`: hand out no more, finish what is under way."""

    def __init__(self) -> None:
        self.reason = self.why = ""

    def set(self, reason: str, why: str = "") -> None:
        if not self.reason:
            self.reason, self.why = reason, why


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
    commits = Commits(job.storage, job.run_id, job.commit_every, job.with_texts)
    progress = Progress(total=len(job.enumeration))
    samples = Table(job.storage, "samples")
    done = IdSet(batch.column("sample_id") for batch in samples.batches(["sample_id"], job.rows))
    progress.before_accepted = count_accepted(job.storage, job.rows)
    failed, attempts = failures(job.storage, job.rows, job.retry)
    progress.before_done = len(done) + len(failed)
    limit = job.target.samples
    if limit is not None:
        progress.total = min(progress.total, limit)

    def is_done(ids: list[str]) -> np.ndarray:
        return done.contains(ids) | failed.contains(ids)

    batches = Batches(job.enumeration, is_done, job.batch_size, attempts, job.seed, limit)
    ledger = Ledger()
    run = _Run(job, commits, progress, ledger, stop, report)
    first = job.hand_out(iter(batches))
    if run.target_reached():
        return Outcome("reached", 0, progress, 0.0, {}, "")
    ready = next(first, None)
    if ready is None:
        return Outcome("exhausted", batches.planned_through, progress, 0.0, {}, "")
    with beating(Pulse(job.storage, job.run_id), "running", run.counts, lambda: stop.set("stopped")):
        try:
            run.make(ready, first, groups)
            run.commit(force=True)
        finally:
            run.observer.end(commits, ledger, progress.accepted)
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
        stop.why,
        run.taken_out,
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
        self.observer = Observer(job.run_id, job.name)
        self._came = 0  # batches
        self._deadline = parse_deadline(job.budget.deadline)
        self._window = Window(job.guards)
        self._canary: Batch | None = None
        self._bad: Breach | None = None
        self.taken_out: dict[str, str] = {}

    def target_reached(self) -> bool:
        wanted = self.job.target.accepted
        return wanted is not None and self.progress.before_accepted + self.progress.accepted >= wanted

    def make(self, first: Batch, more: Iterator[Batch], place: Callable[[], tuple[Group, ...]]) -> None:
        """Take batches through the graph, to their rows. A graph that breaks is started again while there is progress, and
        one with a bad device is started again without it."""
        batches, groups, broke = itertools.chain([first], more), place(), True
        if self.job.guards.canary and sum(group.most_actors for group in groups if group.samples) > 1:
            self._canary = canary_batch(take(first, np.array([0])))
        while broke:
            lost, broke = self.drive(batches, groups, in_flight(groups))
            if self._bad is not None and self._take_out(self._bad, bool(lost)):
                groups, broke = place(), True
                lost, _ = self.drive(iter(lost), groups, in_flight(groups), to_the_end=True)
            if lost:
                log().warning("batches were lost with their workers; each is tried again by itself", batches=len(lost))
            # Most of them only stood beside the one that killed the worker: each gets the graph to itself.
            lost, _ = self.drive(iter(lost), groups, 1, to_the_end=True)
            singles = (take(batch, np.array([at])) for batch in lost for at in range(size(batch)))
            died, _ = self.drive(singles, groups, 1, to_the_end=True) if lost else ([], False)
            for batch in died:
                log().warning("sample failed", stage="", sample_id=batch["sample_id"][0], error_type="worker_died")
                self.commits.add([worker_died(self.job.storage, self.job.run_id, batch)])
                self.progress.failed += 1
                self.observer.died()

    def _take_out(self, bad: Breach, is_needed: bool) -> bool:
        """Keep bad devices from everybody, or pause. WorldFault where that cannot be, and batches still need a device."""
        self._bad = None
        if all(map(hold, bad.devices.split(","))):
            log().warning("devices were taken out", devices=bad.devices, why=bad.why)
            self.taken_out[bad.devices] = bad.why
            self._window.forget(bad.devices)
            return True
        why = f"{bad.why}, on {bad.devices}, which could not be taken out"
        if is_needed:
            raise WorldFault(why)
        self.stop.set("paused", why)
        return False

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
            with contextlib.closing(results(feeder, groups, context, time.time(), self._canary)) as out:
                for batch in out:
                    self._take(feeder, batch, to_the_end)
                    self._tick(feeder)
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

    def commit(self, force: bool = False) -> None:
        rows = self.commits.commit(force)
        self.progress.committed += rows
        if rows:
            self.progress.last_commit = time.time()

    def _save(self) -> None:
        """What is written and whole is not lost with the run."""
        try:
            self.commit(force=True)
        except Exception as error:
            log().warning("could not commit", error=f"{type(error).__name__}: {error}")

    def _feed(self, feeder: Feeder, batches: Iterator[Batch], to_the_end: bool) -> None:
        while feeder.has_room:
            if not to_the_end:
                if self.stop.reason or self._bad or self.target_reached():
                    feeder.close()
                    return
                if feeder.samples_in_flight and self._enough_under_way(feeder.samples_in_flight):
                    return
            batch = next(batches, None)
            if batch is None:
                feeder.close()
                return
            feeder.put(batch)
            self.progress.launched += size(batch)

    def _enough_under_way(self, samples: int) -> bool:
        """Whether what is in flight will probably reach the target."""
        wanted = self.job.target.accepted
        if wanted is None:
            return False
        rate = (self.progress.accepted + 1) / (self.progress.done + 2)
        return self.progress.before_accepted + self.progress.accepted + rate * samples >= wanted

    def _take(self, feeder: Feeder, batch: Batch, to_the_end: bool) -> None:
        if "fault" in batch:
            kind, _, message = str(batch["fault"][0]).partition(": ")
            if kind == "device" and not to_the_end:
                devices, _, why = message.partition(": ")
                self._bad = self._bad or Breach(why, devices)
                return
            raise UserError(message) if kind == "user" else WorldFault(message)
        if "result" not in batch:
            return
        result = json.loads(batch["result"][0])
        put = feeder.done(result["batch_index"])
        if put is None:
            return
        self._came += 1
        self.progress.accepted += result["accepted"]
        self.progress.rejected += result["rejected"]
        self.progress.failed += result["failed"]
        devices = next((entry["devices"] for entry in result["ledger"] if entry["devices"]), "")
        if breach := self._window.add(devices, result["accepted"], result["rejected"], result["failed"]):
            if breach.devices and not to_the_end:
                self._bad = self._bad or breach
            elif not breach.devices:
                self.stop.set("paused", breach.why)
        self.progress.last_result = time.time()
        if not self.progress.first_result:
            self.progress.first_result, self.progress.first_done = self.progress.last_result, self.progress.done
        self.progress.nbytes += result["media_nbytes"] + sum(part["nbytes"] for part in result["parts"])
        self.observer.came(put, result)
        self.ledger.add(result["ledger"])
        self.commits.add(result["parts"])

    def _tick(self, feeder: Feeder) -> None:
        self.commit()
        budget = self.job.budget
        now = time.time()
        self.progress.allocated = self.ledger.allocated(now)
        self.report(self.progress)
        self.observer.look(feeder.batches_in_flight, self.commits, self.ledger, self.progress.accepted)
        if budget.bytes is not None and self.progress.nbytes >= budget.bytes:
            self.stop.set("budget")
        if self._deadline is not None and now >= self._deadline:
            self.stop.set("budget")
        if budget.accelerator_seconds is not None and self.progress.allocated >= budget.accelerator_seconds:
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
            "before_done": progress.before_done,
            "samples_per_second": round(progress.rate, 4),
            "accelerator_seconds": round(progress.allocated, 1),
            "last_commit": progress.last_commit,
        }


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
