"""Tells those who watch a run how it goes: Prometheus always, a trace collector where it is asked for."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

from infra.metrics import (
    BUSY_SHARE,
    COMMIT_LAG,
    IN_FLIGHT,
    PER_ACCEPTED,
    SAMPLES,
    STAGE_SECONDS,
    WAITING,
    Metrics,
)
from infra.traces import Traces, traces
from pipelines.commits import Commits
from pipelines.ledger import Ledger
from stages.batch import Batch

LOOK_SECONDS = 1.0


class Observer:
    """Of one run, in its driver; used only while that is connected to Ray."""

    def __init__(self, run_id: str, dataset: str) -> None:
        self._run_id, self._dataset = run_id, dataset
        self._looked = 0.0

    @cached_property
    def _metrics(self) -> Metrics:
        return Metrics(self._dataset)

    @cached_property
    def _traces(self) -> Traces | None:
        return traces(self._run_id, self._dataset)

    def came(self, batch: Batch, result: dict[str, Any]) -> None:
        """A batch came out. `result`: as WriteShards gives it, with the actors' steps."""
        for verdict in ("accepted", "rejected", "failed"):
            self._metrics.add(SAMPLES, result[verdict], verdict=verdict)
        for step in (step for entry in result["ledger"] for step in entry.get("steps", ())):
            for kind in ("accelerator", "cpu"):
                self._metrics.add(STAGE_SECONDS, step[f"{kind}_seconds"], stage=step["stage"], kind=kind)
        if self._traces is not None:
            self._traces.batch(result["batch_index"], batch["sample_id"].tolist(), result["ledger"], time.time())

    def died(self) -> None:
        """A sample was given up, whose worker died with it."""
        self._metrics.add(SAMPLES, 1, verdict="failed")

    def look(self, in_flight: int, commits: Commits, ledger: Ledger, accepted: int) -> None:
        """How things are, if it is time for a look."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._metrics.set(IN_FLIGHT, in_flight)
        self._metrics.set(WAITING, commits.waiting)
        self._metrics.set(COMMIT_LAG, commits.lag)
        self._metrics.set(BUSY_SHARE, ledger.busy_share)
        if accepted:
            self._metrics.set(PER_ACCEPTED, ledger.allocated(time.time()) / accepted)

    def end(self, commits: Commits, ledger: Ledger, accepted: int) -> None:
        """The run is over: a gauge keeps its last value for as long as the cluster lives."""
        if "_metrics" in self.__dict__:  # it came so far
            self._looked = 0.0
            self.look(0, commits, ledger, accepted)
            self._metrics.set(BUSY_SHARE, 0.0)
        if sent := self.__dict__.get("_traces"):
            sent.end()
