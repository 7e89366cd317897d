"""Curating the whole way through real parts: the command, Ray, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.storage import Storage
from infra.tables import Table
from models.pack.planted import plant

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]


def _run(spec: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--json"]
    done = subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_folder_is_curated_and_a_second_run_takes_only_what_is_new(tmp_path: Path) -> None:
    truths = plant(tmp_path / "planted", 12)
    copied = {truth.duplicate_of for truth in truths}
    later = next(truth.file for truth in truths if not truth.flaw and truth.file not in copied)
    clips = tmp_path / "planted" / "clips"
    (clips / "broken.mp4").write_bytes(b"no video")
    held_back = (tmp_path / "planted" / later).rename(tmp_path / "later.mp4")
    spec = tmp_path / "spec.yaml"
    sections = {
        "name": "curated",
        "recipe": "curate",
        "sources": [{"path": str(clips)}],
        "cut": {"detector": "none"},
        "layout": {"batch_size": 4},
        "judge": {"backend": "none"},
        "caption": None,
        "output": {"uri": str(tmp_path / "made")},
    }
    spec.write_text(yaml.safe_dump(sections), encoding="utf-8")
    first = _run(spec)
    storage = Storage(str(tmp_path / "made"))
    planned = Table(storage, "prompts").read().num_rows
    assert first["verify"] == []
    assert first["accepted"] + first["rejected"] + first["failed"] == planned
    assert [row["error_type"] for row in Table(storage, "failures").read().to_pylist()][:1] == ["not_media"]
    held_back.rename(tmp_path / "planted" / later)
    second = _run(spec)
    assert second["accepted"] + second["rejected"] + second["failed"] == 1
    assert second["verify"] == []
