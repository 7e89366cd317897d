"""OpenTelemetry traces, where OTEL_EXPORTER_OTLP_ENDPOINT asks for them: one for each batch, a span for each of its stages.

The driver makes them when a batch has come out, of what the actors said; nothing is traced inside of a model. A span names
samples by id. Prompts are never in one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from infra.telemetry import log

ASKED = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FLUSH_SECONDS = 5.0


class Traces:
    """Sends traces over HTTP from a thread of its own; a collector that is away costs the traces, nothing else."""

    def __init__(self, run_id: str, dataset: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        about = {"service.name": "ditmill", "ditmill.run_id": run_id, "ditmill.dataset": dataset}
        # Not the global one, which Prefect's spans and the user's own code go by.
        self._provider = TracerProvider(resource=Resource.create(about))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ditmill")

    def batch(self, number: int, sample_ids: Sequence[str], entries: list[dict[str, Any]], ended: float) -> None:
        """The trace of a batch. `entries`: of the ledger, with their `steps`."""
        from opentelemetry import trace
        from opentelemetry.context import Context

        steps = [(entry, step) for entry in entries for step in entry.get("steps", ())]
        began = min((step["began"] for _, step in steps), default=ended)
        ids = {"ditmill.batch_index": number, "ditmill.sample_ids": [str(name) for name in sample_ids]}
        root = self._tracer.start_span("batch", context=Context(), start_time=_nanoseconds(began), attributes=ids)
        inside = trace.set_span_in_context(root)
        for entry, step in steps:
            span = self._tracer.start_span(
                step["stage"],
                context=inside,
                start_time=_nanoseconds(step["began"]),
                attributes={
                    "ditmill.group": entry["group"],
                    "ditmill.actor": entry["actor"],
                    "ditmill.accelerator_seconds": step["accelerator_seconds"],
                    "ditmill.cpu_seconds": step["cpu_seconds"],
                },
            )
            span.end(_nanoseconds(step["ended"]))
        root.end(_nanoseconds(ended))

    def end(self) -> None:
        self._provider.force_flush(int(1000 * FLUSH_SECONDS))
        self._provider.shutdown()


def traces(run_id: str, dataset: str) -> Traces | None:
    """Traces of a run, None where nobody asked for them or the extra `telemetry` is not installed."""
    asked = next((name for name in ASKED if os.environ.get(name)), None)
    if asked is None:
        return None
    try:
        return Traces(run_id, dataset)
    except ImportError as error:
        log().warning(f"the extra `telemetry` is not installed, so {asked} is not served: pip install -e .[telemetry]")
        log().debug("no traces", error=str(error))
        return None


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
