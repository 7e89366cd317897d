"""`ditmill stop` and Ctrl-C: the run ends by itself, what was in hand is committed, and the next run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from infra.storage import Storage
from infra.tables import Table
from pipelines.verify import verify

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "flows.cli"]
PROMPTS = 2000


def test_a_run_that_is_asked_to_stop_ends_cleanly_and_the_next_one_goes_on(tmp_path: Path) -> None:
    root = str(tmp_path / "data")
    spec = {
        "name": "stopped",
        "prompts": {"inline": [f"thing {at}" for at in range(PROMPTS)], "near_duplicates": "ignore"},
        "layout": {"batch_size": 2},
        "sampler": {"num_inference_steps": 2},
        "judge": {"backend": "none"},
        "caption": None,
        "output": {"uri": root, "commit_every": 0.1},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    before = 0
    for by in ("command", "signal"):
        with _run(path, tmp_path / f"{by}.jsonl") as run:
            _until_rows(root, before + 1, run)
            if by == "command":
                said = subprocess.run([*COMMAND, "stop", root], cwd=REPO, capture_output=True, text=True, check=True)
                assert "to stop" in said.stdout
            else:
                run.send_signal(signal.SIGINT)
            assert run.wait(120) == 0
            assert run.stdout is not None
            result = json.loads(run.stdout.read())
        rows = Table(Storage(root), "samples").read(["run_id"]).num_rows
        assert result["status"] == "stopped"
        assert before < rows < PROMPTS
        assert result["accepted"] + result["rejected"] + result["failed"] == rows - before
        assert list(map(str, verify(Storage(root)))) == []
        before = rows


@contextmanager
def _run(spec: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, which does not outlive the test."""
    command = [*COMMAND, "run", str(spec), "--json"]
    with (
        log.open("w", encoding="utf-8") as lines,
        subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=lines, text=True) as run,
    ):
        try:
            yield run
        finally:
            run.kill()


def _until_rows(root: str, wanted: int, run: subprocess.Popen[str]) -> None:
    """Wait until the dataset has so many rows."""
    while run.poll() is None:
        try:
            run.wait(0.5)
        except subprocess.TimeoutExpired:
            table = Path(root) / "samples" / "_delta_log"
            if table.exists() and Table(Storage(root), "samples").read(["run_id"]).num_rows >= wanted:
                return
    raise AssertionError(f"the run ended with {run.returncode} before {wanted} rows were committed")
