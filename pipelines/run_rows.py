"""What an invocation says of itself in `runs`: a row for each event of it."""

from __future__ import annotations

import json
import platform
import socket
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from infra.commit import Committer, write_part
from infra.schema import RUNS
from infra.secrets import redact
from infra.tables import Table
from pipelines.resolve import Resolved, code_version
from pipelines.thresholds import as_told

LIBRARIES = ("torch", "diffusers", "transformers", "ray", "prefect", "deltalake", "pyarrow", "av", "numpy")


def commit_run_row(run: Resolved, event: str, **values: Any) -> None:
    """Append this run's row for `event` (started, indexed or ended) to `runs`."""
    row: dict[str, Any] = {
        "run_id": run.run_id,
        "event": event,
        "command": redact(" ".join(sys.argv)),
        "spec_json": redact(run.spec.model_dump_json()),
        "versions_json": json.dumps({"ditmill": code_version(), "python": platform.python_version(), **_versions()}),
        "hosts_json": json.dumps([{"host": socket.gethostname(), "machine": platform.machine()}]),
        "licences_json": json.dumps([{"model": model, **asdict(licence)} for model, licence in run.licences]),
        "created_at": datetime.now(UTC),
        **values,
    }
    if points := as_told(run):
        row["extra_json"] = json.dumps({**json.loads(row.get("extra_json") or "{}"), **points})
    committer = Committer(Table(run.storage, "runs"), run.run_id)
    part = write_part(run.storage, f"runs/{run.run_id}-{event}.parquet", pa.Table.from_pylist([row], RUNS))
    committer.commit([part])


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
