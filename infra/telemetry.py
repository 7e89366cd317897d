"""Logs: structlog, bound with run_id, stage and sample_id; JSON lines on stderr, in Ray workers too.

A worker's stderr is a file of its Ray session; Ray hands it on to the driver's where the level is INFO or DEBUG.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from infra.secrets import redact

LEVEL = "DITMILL_LOG_LEVEL"


def configure(**everywhere: str) -> None:
    """Set up structlog in this process and bind values to every line of it. Calling it again rebinds."""
    level = logging.getLevelNamesMapping().get(os.environ.get(LEVEL, "WARNING").upper(), logging.WARNING)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _with_values,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.UnicodeDecoder(),
            _without_secrets,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),  # what stderr is by then
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    _values.clear()
    _values.update(everywhere)


_values: dict[str, str] = {}
"""Of the whole process: Ray makes an actor in one thread and calls it in others, which share no context variables."""


def _with_values(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in _values.items():
        event.setdefault(name, value)
    return event


def _without_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What libraries say of a URL that failed has all of it."""
    return {name: redact(value) if isinstance(value, str) else value for name, value in event.items()}


bound = structlog.contextvars.bound_contextvars
"""`with bound(stage="judge"):` binds values to the lines of a block. Threads that it starts begin without them."""


def values() -> dict[str, Any]:
    """What is bound to a line that is written here and now."""
    return {**_values, **structlog.contextvars.get_contextvars()}


def log() -> Any:
    return structlog.get_logger()
