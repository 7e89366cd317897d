"""What Prometheus is told of a run, by Ray's own exporter: the metrics port of the driver's node has it.

Ray puts `ray_` before each name. It exports only with the extra `telemetry`; without it a record is a few microseconds lost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from infra.errors import UserError
from infra.telemetry import log

PORT = "DITMILL_METRICS_PORT"
"""Environment variable: where a run that starts its own Ray session has the metrics; a cluster has a port of its own."""
MISSING = "the extra `telemetry` is not installed, so {} is not served: pip install -e .[telemetry]"


@dataclass(frozen=True)
class Metric:
    """`labels` come beside `dataset`."""

    name: str
    kind: Literal["counter", "gauge"]
    about: str
    labels: tuple[str, ...] = ()


SAMPLES = Metric("ditmill_samples_total", "counter", "Samples that came out.", ("verdict",))
STAGE_SECONDS = Metric(
    "ditmill_stage_seconds_total", "counter", "Seconds of samples by stage: accelerator or cpu.", ("stage", "kind")
)
IN_FLIGHT = Metric("ditmill_batches_in_flight", "gauge", "Batches handed out that have not come out.")
WAITING = Metric("ditmill_samples_waiting_for_commit", "gauge", "Samples written that no transaction holds yet.")
COMMIT_LAG = Metric("ditmill_commit_lag_seconds", "gauge", "How long the oldest of them has waited.")
BUSY_SHARE = Metric(
    "ditmill_accelerator_busy_share", "gauge", "Share of the accelerator-seconds held in which there was a batch."
)
PER_ACCEPTED = Metric(
    "ditmill_accelerator_seconds_per_accepted", "gauge", "Accelerator-seconds held, by samples accepted, in this run."
)
METRICS = (SAMPLES, STAGE_SECONDS, IN_FLIGHT, WAITING, COMMIT_LAG, BUSY_SHARE, PER_ACCEPTED)


class Metrics:
    """The metrics of one dataset in this process, which is connected to Ray."""

    def __init__(self, dataset: str) -> None:
        from ray.util.metrics import Counter, Gauge

        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge}
        self._known = {
            metric: kinds[metric.kind](metric.name, metric.about, ("dataset", *metric.labels)) for metric in METRICS
        }
        self._dataset = dataset

    def add(self, metric: Metric, value: float, **labels: str) -> None:
        """Count up. Ray takes no zero."""
        if value > 0:
            self._known[metric].inc(value, {"dataset": self._dataset, **labels})

    def set(self, metric: Metric, value: float) -> None:
        self._known[metric].set(value, {"dataset": self._dataset})


def export_port() -> int | None:
    """The port that is asked for in the environment."""
    asked = os.environ.get(PORT)
    if not asked:
        return None
    if not asked.isdecimal() or not 0 < int(asked) < 65536:
        raise UserError(f"{PORT}: expected a port, 1 to 65535, found {asked!r}")
    from ray._private.utils import get_dashboard_dependency_error

    if get_dashboard_dependency_error() is not None:
        log().warning(MISSING.format(f"{PORT}={asked}"))
    return int(asked)
