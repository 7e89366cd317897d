"""What a dataset holds and what its live runs are doing, from any machine that sees the storage."""

from __future__ import annotations

import time
from typing import Any

import pyarrow.compute as pc

from infra.control import live_runs
from infra.storage import Storage
from infra.tables import Table, read_dataset_json
from pipelines.decisions import count_accepted


def dataset_status(storage: Storage) -> dict[str, Any]:
    """Counts of the tables, live runs with their progress, and the last run that ended."""
    samples = Table(storage, "samples").dataset()
    ended = (
        Table(storage, "runs").read(None, (pc.field("event") == "ended") & pc.field("plan_file").is_valid()).to_pylist()
    )
    last = max(ended, key=lambda row: row["created_at"], default=None)
    now = time.time()
    return {
        "dataset": storage.root,
        "name": read_dataset_json(storage)["name"],
        "samples": samples.count_rows(),
        "accepted": count_accepted(storage),
        "failures": Table(storage, "failures").dataset().count_rows(),
        "prompts": Table(storage, "prompts").dataset().count_rows(),
        "annotations": Table(storage, "annotations").dataset().count_rows(),
        "live": [
            {
                "run_id": beat.run_id,
                "host": beat.host,
                "state": "stale" if beat.is_stale else beat.state,
                "seconds": round(now - beat.started_at),
                "heartbeat_seconds_ago": round(now - beat.renewed_at),
                **beat.progress,
            }
            for beat in live_runs(storage)
        ],
        "last_run": last and {key: last[key] for key in ("run_id", "status", "accepted", "rejected", "failed")},
    }


def render(found: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"{found['name']}  {found['dataset']}",
        f"  {found['samples']} samples, {found['accepted']} accepted; {found['failures']} failures;"
        f" {found['prompts']} prompts; {found['annotations']} annotations",
    ]
    for run in found["live"]:
        lines.append(
            f"  {run['run_id']} on {run['host']}: {run['state']} for {run['seconds']} s,"
            f" {run.get('accepted', 0)} accepted, {run.get('rejected', 0)} rejected, {run.get('failed', 0)} failed"
            f" of {run.get('total', '?')}; heartbeat {run['heartbeat_seconds_ago']} s ago"
        )
    last = found["last_run"]
    if last:
        lines.append(
            f"  last run {last['run_id']}: {last['status']}, {last['accepted'] or 0} accepted,"
            f" {last['rejected'] or 0} rejected, {last['failed'] or 0} failed"
        )
    if not found["live"]:
        lines.append("  no run is live")
    return "\n".join(lines)
