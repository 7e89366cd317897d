"""What a run of recipe curate lists, and whether an earlier one indexed all of it."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

from infra.storage import Storage
from infra.tables import Table
from pipelines.spec import Spec

VERSION = 1
"""Of what a file's clips depend on besides the file and the settings: another one indexes all of them anew."""
EVENT = "indexed"
"""In `runs`: a listing was indexed whole. `extra_json` has listing, read, kept and bad."""


def index_of(spec: Spec) -> str:
    """A hash of all that decides which clips a file has."""
    kept = {"fps": spec.clip.fps, "max_side": spec.clip.max_side, "crop": spec.clip.crop}
    return _hash({"cut": spec.cut.model_dump(), **kept, "version": VERSION})


def listing_of(spec: Spec) -> str:
    """A hash of all that decides which files are listed, and which clips they have."""
    return _hash({"sources": [source.model_dump() for source in spec.sources], "index": index_of(spec)})


def unfinished(storage: Storage, spec: Spec) -> dict[str, Any] | None:
    """The newest row of `runs`, with what its `extra_json` says, of a run that indexed all that a spec lists; None where
    there is none, or all samples of it are made: then there may be new files."""
    listing, done = listing_of(spec), set[str]()
    found: dict[str, Any] | None = None
    for row in Table(storage, "runs").read(["event", "status", "plan_file", "extra_json", "created_at"]).to_pylist():
        if row["event"] == "ended" and row["status"] == "exhausted":
            done.add(row["plan_file"])
        elif row["event"] == EVENT:
            row |= json.loads(row["extra_json"])
            if row["listing"] == listing and (found is None or row["created_at"] > found["created_at"]):
                found = row
    return None if found is None or found["plan_file"] in done else found


def _hash(values: dict[str, Any]) -> str:
    return blake2b(json.dumps(values, sort_keys=True, default=list).encode(), digest_size=16).hexdigest()
