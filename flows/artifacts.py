"""What Prefect is told of a run. A Prefect server that is away holds nothing up: it misses what it was not told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from infra.telemetry import log

EVERY_SECONDS = 10.0
LAST_SECONDS = 5.0


@contextmanager
def progress_artifact(description: str) -> Iterator[Callable[[float], None]]:
    """Yields a function that takes the share done, 0 to 1, and returns at once; a thread of its own tells Prefect."""
    latest = [0.0]
    ending = threading.Event()

    def tell() -> None:
        artifact: Any = _told(create_progress_artifact, 0.0, description=description)
        while artifact is not None:
            over = ending.wait(EVERY_SECONDS)
            _told(update_progress_artifact, artifact, 100.0 * min(1.0, latest[0]))
            if over:
                return

    def show(share: float) -> None:
        latest[0] = share

    # Prefect finds in the context which run an artifact belongs to.
    thread = threading.Thread(target=copy_context().run, args=(tell,), name="progress-artifact", daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ending.set()
        thread.join(LAST_SECONDS)


def publish_summary(counts: dict[str, int], description: str, report: str | None) -> None:
    """A table of verdicts, and a link to the report where there is a URL for it."""
    rows = [{"verdict": name, "samples": count} for name, count in counts.items()]
    _told(create_table_artifact, rows, description=description)
    if report is not None:
        _told(create_link_artifact, report, description="gallery and funnel")


def _told(tell: Callable[..., Any], *values: Any, **named: Any) -> Any:
    try:
        return tell(*values, **named)
    except Exception as error:
        log().warning("Prefect could not be told", what=tell.__name__, error=f"{type(error).__name__}: {error}")
        return None
