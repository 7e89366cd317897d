"""Logs: structlog, bound with run_id, stage and sample_id; JSON lines on stderr, in Ray workers too."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog

LEVEL = "DITMILL_LOG_LEVEL"


def configure(**bound: str) -> None:
    """Set up structlog in this process and bind values to every line. Calling it again rebinds."""
    level = logging.getLevelNamesMapping().get(os.environ.get(LEVEL, "WARNING").upper(), logging.WARNING)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.UnicodeDecoder(),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)


def log() -> Any:
    return structlog.get_logger()
