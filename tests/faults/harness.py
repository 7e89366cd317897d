"""Runs of `ditmill run` as processes of their own, that tests can watch, kill and run again.

Every process of a run carries a mark in its environment, so that what is left over of a killed run can be found wherever
the kernel has put it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import numpy as np
import yaml

from infra.storage import Storage

REPO = Path(__file__).resolve().parents[2]
MARK = "DITMILL_TEST_RUN"

KINDS = {
    "driver": ("bin/ditmill",),
    "actor": ("ray::MapWorker",),
    "mailbox": ("ray::Mailbox",),
    "reader": ("ray::ReadMailbox",),
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs/gcs_server",),
    "prefect": ("prefect_server.py",),
}
"""What the command line of each process of a run holds."""


OUTPUT: dict[str, Any] = {"commit_every": 0.2, "tensors": {"latents": "float32"}}
"""How each dataset is written."""


@dataclass(frozen=True)
class Process:
    """One process of a run. `started` tells it from a later one with the same number."""

    pid: int
    started: str
    command: str

    @property
    def kind(self) -> str:
        return next((kind for kind, words in KINDS.items() if any(word in self.command for word in words)), "other")

    @property
    def lives(self) -> bool:
        found = _look(self.pid)
        return found is not None and found.started == self.started


@dataclass
class Launch:
    """A `ditmill` command that was started."""

    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid4().hex)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment, MARK: self.mark}
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                [str(Path(sys.executable).with_name("ditmill")), *self.arguments],
                stdout=subprocess.PIPE,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.log.parent,
                start_new_session=True,
                text=True,
            )

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    def wait(self, seconds: float = 240.0) -> int:
        """The exit code. A run that does not end is killed, and the test fails."""
        try:
            self.stdout = self.popen.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"{self.arguments} did not end in {seconds:.0f} s; its log:\n{self.said()}") from None
        return self.popen.returncode

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[Process]:
        """All live processes of this run, the driver included, whoever is their parent now."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if wanted in (entry / "environ").read_bytes() and (process := _look(int(entry.name))):
                    found.append(process)
            except OSError:
                continue  # it ended, or belongs to somebody else
        return found

    def find(self, kind: str) -> list[Process]:
        return [process for process in self.processes() if process.kind == kind]

    def kill(self, kind: str, choose: Callable[[list[Process]], Process] = lambda found: found[0]) -> Process | None:
        """SIGKILL one process of that kind, or of any; None where there is none (any more)."""
        if kind == "driver":
            self.popen.send_signal(signal.SIGKILL)
            return Process(self.popen.pid, "", KINDS["driver"][0])
        found = self.processes() if kind == "any" else self.find(kind)
        if not found:
            return None
        victim = choose(found)
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return victim

    def left_over(self, seconds: float = 20.0) -> list[Process]:
        """Processes of this run that are still there, after waiting so long for them to go."""
        end = time.monotonic() + seconds
        while (found := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def stop(self) -> None:
        for process in self.processes():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


class Watched:
    """A dataset, looked at from outside while runs write it."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._version = -1
        self._committed: dict[str, int] = {}

    def versions(self, table: str) -> int:
        return sum(
            PurePosixPath(name).match("0*.json") for name in self.storage.files(f"{table}/_delta_log", recursive=False)
        )

    def committed(self) -> dict[str, int]:
        """Parts of `samples` that its log names, with their rows."""
        while self.storage.exists(name := f"samples/_delta_log/{self._version + 1:020d}.json"):
            for line in self.storage.read_bytes(name).splitlines():
                if add := json.loads(line).get("add"):
                    self._committed[add["path"]] = json.loads(add["stats"])["numRecords"]
            self._version += 1
        return self._committed

    def rows(self) -> int:
        return sum(self.committed().values())

    def uncommitted(self) -> list[str]:
        """Parts of `samples` that are written and not committed (yet)."""
        written = [name for name in self.storage.files("samples", recursive=False) if name.endswith(".parquet")]
        known = self.committed()
        return [name for name in written if PurePosixPath(name).name not in known]

    def uncommitted_rows(self) -> int:
        import pyarrow as pa
        import pyarrow.parquet as pq

        return sum(
            pq.read_metadata(pa.BufferReader(self.storage.read_bytes(name))).num_rows for name in self.uncommitted()
        )

    def latents(self) -> dict[str, np.ndarray]:
        """sample_id -> latents, read out of the tars."""
        from safetensors.numpy import load

        from infra.tables import Table

        found = {}
        for row in Table(self.storage, "samples").read(["sample_id", "tensors"]).to_pylist():
            (tensor,) = row["tensors"]
            data = self.storage.read_bytes(tensor["shard"], tensor["offset"], tensor["offset"] + tensor["nbytes"])
            assert row["sample_id"] not in found, f"{row['sample_id']} is two rows"
            found[row["sample_id"]] = load(data)["latents"]
        return found

    def check(self, reference: dict[str, np.ndarray]) -> None:
        """Assert that every promise holds, that nothing is left over, and that latents equal an undisturbed run's."""
        from infra.control import sweep_stale
        from infra.vacuum import vacuum
        from pipelines.verify import verify

        findings = [str(finding) for finding in verify(self.storage)]
        if self.storage.is_s3 and findings and all(map(LATE.match, findings)):
            print("  after the end:", *findings, flush=True)
            vacuum(self.storage, older_than=0.0)
            findings = [str(finding) for finding in verify(self.storage)]
        assert findings == [], findings
        found = self.latents()
        assert found.keys() == reference.keys()
        for sample_id, latents in reference.items():
            assert found[sample_id].tobytes() == latents.tobytes(), f"the latents of {sample_id} differ"
        if self.storage.is_s3:
            # A heartbeat, likewise. The next run sweeps it.
            sweep_stale(self.storage, but="")
        assert list(self.storage.files("control")) == []
        assert [name for name in self.storage.files() if ".tmp" in name] == []


LATE = re.compile(r"(part_not_in_log|shard_not_referenced)\b")
"""A file that no transaction refers to: what a request leaves that its client gave up and that lands after the run's end."""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of `kill_spec`."""

    spec: Path
    dataset: Watched
    latents: dict[str, np.ndarray]


def kill_spec(path: Path, **changes: Any) -> Path:
    """18 batches of a third of a second each: there is time to kill a run in many places, and to run it many times."""
    prompts = [f"{thing} number {number}" for number in range(12) for thing in ("a red circle", "a dog", "two boats")]
    return write_spec(
        path,
        prompts={"inline": prompts, "near_duplicates": "ignore"},
        layout={"batch_size": 2},
        sampler={"num_inference_steps": 6},
        score={"reject_static": False, "reject_duplicates": False},
        **changes,
    )


def write_spec(path: Path, **changes: Any) -> Path:
    """A spec of pack://tiny that is quick on a CPU, with top-level keys replaced by `changes`."""
    spec = {
        "name": path.stem,
        "generators": [{"model": "pack://tiny"}],
        "layout": {"batch_size": 4},
        "sampler": {"num_inference_steps": 2},
        "judge": {"backend": "none"},
        "caption": None,
        "output": {"uri": str(path.with_suffix("")), **OUTPUT},
        **changes,
    }
    path.write_text(yaml.safe_dump(spec))
    return path


def documented(heading: str) -> list[list[str]]:
    """The rows of the table below a heading of docs/operations.md, as plain cells."""
    page = (REPO / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows[1:]]


def _look(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, IndexError):
        return None
    return None if stat[0] in "ZX" else Process(pid, stat[19], command)
