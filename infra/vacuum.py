"""Removes what no transaction refers to: what killed runs left, half-written files, releases that were never published."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pyarrow.compute as pc

from infra.control import live_runs, sweep_stale, uncommitted_files
from infra.storage import Storage
from infra.tables import Table

OLD_SECONDS = 3600.0
"""What has no run that is known to be over is left alone for so long."""

HALF_WRITTEN = re.compile(r"\.[0-9a-f]{8}\.tmp$")


def vacuum(storage: Storage, dry_run: bool = False, older_than: float = OLD_SECONDS) -> list[str]:
    """Remove them; their names.

    Files of a live run are never touched. Those of a run that has ended go at once, those of a stale run after it was
    fenced, and others when they are `older_than` seconds. With `dry_run` nothing is removed or fenced.
    """
    # What has ended is read before what lives: a run that ends in between counts as neither.
    ended = set(Table(storage, "runs").read(["run_id"], pc.field("event") == "ended")["run_id"].to_pylist())
    beats = live_runs(storage)
    live = {beat.run_id for beat in beats if not beat.is_stale}
    stale = {beat.run_id for beat in beats} - live
    removed: list[str] = []
    if not dry_run:
        removed = [name for names in sweep_stale(storage, but="").values() for name in names]
    for name in _unreferenced(storage, bool(live)):
        owner = _owner(name, live | stale | ended)
        if owner in live or (owner is None and not _is_older(storage, name, older_than)):
            continue
        removed.append(name)
        if not dry_run:
            storage.delete(name)
    removed += _abort_uploads(storage, dry_run, older_than) if storage.is_s3 else []
    return sorted(set(removed))


def _abort_uploads(storage: Storage, dry_run: bool, older_than: float) -> list[str]:
    """Uploads in parts that a killed process left: nobody else would ever end them."""
    from infra.s3 import abort_upload, unfinished_uploads

    try:
        found = [upload for upload in unfinished_uploads(storage) if time.time() - upload.began > older_than]
    except PermissionError:
        return []  # it takes a right of its own to list them
    for upload in [] if dry_run else found:
        abort_upload(storage, upload)
    return [f"{upload.name} (unfinished upload)" for upload in found]


def _unreferenced(storage: Storage, any_live: bool) -> Iterator[str]:
    yield from uncommitted_files(storage)
    yield from _unpublished(storage)
    if not any_live:  # a run that begins may take up a plan file that is there already
        plans = list(storage.files("plans"))
        used = set(Table(storage, "runs").read(["plan_file"])["plan_file"].to_pylist()) if plans else set()
        yield from (name for name in plans if name not in used)
    for folder in ("", "control", "report", "cache/answers", "cache/questions", "cache/signatures"):
        for name in storage.files(folder, recursive=folder == "cache/signatures"):
            if HALF_WRITTEN.search(name) or (folder == "control" and name.endswith(".stop")):
                yield name


def _unpublished(storage: Storage) -> Iterator[str]:
    """Files of releases that no manifest names."""
    names = list(storage.files("releases"))
    published: set[str] = set()
    for name in names:
        if name.endswith("/manifest.json"):
            published.add(name)
            published.update(item["path"] for item in json.loads(storage.read_bytes(name))["files"])
    yield from (name for name in names if name not in published)


def _owner(name: str, runs: set[str]) -> str | None:
    """The run that wrote a file: its parts and shards begin with its id, the files of a release end with the id's end."""
    if name.startswith("releases/"):
        stem = name.rsplit("/", 1)[-1].split(".", 1)[0]
        return next((run for run in runs if stem.endswith(f"-{run.rsplit('-', 1)[-1]}")), None)
    inside = name.partition("/")[2]
    return next((run for run in runs if re.match(rf"{re.escape(run)}[-./]", inside)), None)


def _is_older(storage: Storage, name: str, seconds: float) -> bool:
    try:
        return time.time() - storage.modified(name) > seconds
    except FileNotFoundError:
        return False  # it was renamed or removed meanwhile
