"""What Ray's exporter and a trace collector are told of a run, against what its tables hold."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.metrics import METRICS
from infra.storage import Storage
from infra.tables import Table

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
TELEMETRY = Path(os.environ.get("DITMILL_TEST_TELEMETRY") or Path(sys.prefix, "telemetry"))
"""Where `make test` puts the extra `telemetry`: apart, so that all other tests have the Ray that most users have."""

Exported = dict[str, dict[tuple[tuple[str, str], ...], float]]
"""Metric -> its labels, without Ray's own -> value."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Address and metrics port of a cluster as `ray start --head` makes one."""
    if not TELEMETRY.is_dir():
        pytest.skip(f"the extra `telemetry` is not at {TELEMETRY}; `make test` puts it there")
    port, metrics_port = _free_port(), _free_port()
    env = _env(tmp_path, str(TELEMETRY)) | {"RAY_metrics_report_interval_ms": "500"}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += [
        f"--port={port}",
        f"--metrics-export-port={metrics_port}",
        "--include-dashboard=false",
        "--disable-usage-stats",
    ]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        try:
            _wait_for(lambda: _scrape(metrics_port) is not None, 120)
            yield f"127.0.0.1:{port}", metrics_port
        finally:
            head.terminate()


def test_prometheus_reads_of_a_run_what_its_tables_hold(tmp_path: Path, cluster: tuple[str, int]) -> None:
    """The run is a process of its own: Ray exports nothing of a second session in one process."""
    address, port = cluster
    spec = {
        "name": "watched",
        "prompts": {"inline": ["thing 1", "poor thing", "thing 2", "nothing", "thing 3"], "near_duplicates": "ignore"},
        "generators": [{"model": "pack://tiny"}],
        "sampler": {"num_inference_steps": 2},
        "judge": {"backend": "call", "call": "own_judge:score", "version": "1", "thresholds": {"worth": 0.5}},
        "score": {"reject_duplicates": False},
        "caption": None,
        "output": {"uri": str(tmp_path / "data")},
        "compute": {"ray_address": address},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
    told: Exported = {}
    command = [sys.executable, "-m", "flows.cli", "run", str(tmp_path / "spec.yaml")]
    with (
        (tmp_path / "log").open("wb") as said,
        subprocess.Popen(command, env=_env(tmp_path), stdout=said, stderr=said) as driver,
    ):
        while driver.poll() is None:
            told |= _scrape(port) or {}  # Ray forgets the gauges of a process that has ended
            time.sleep(0.2)
    told |= _scrape(port) or {}
    assert driver.returncode == 0, (tmp_path / "log").read_text()
    storage = Storage(str(tmp_path / "data"))
    rows = {table: Table(storage, table).read().to_pylist() for table in ("samples", "failures", "runs")}
    ended = next(row for row in rows["runs"] if row["event"] == "ended")
    assert set(told) == {metric.name for metric in METRICS}
    assert {key for values in told.values() for labels in values for key in labels if key[0] == "dataset"} == {
        ("dataset", "watched")
    }
    assert {dict(labels)["verdict"]: value for labels, value in told["ditmill_samples_total"].items()} == {
        "accepted": 3,
        "rejected": 1,
        "failed": 1,
    }
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for row in (*rows["samples"], *rows["failures"]):
        for cost in row["cost"]:
            spent[cost["stage"], "accelerator"] += cost["accelerator_seconds"]
    seconds = {
        (dict(labels)["stage"], dict(labels)["kind"]): value
        for labels, value in told["ditmill_stage_seconds_total"].items()
    }
    assert {key: value for key, value in seconds.items() if key[1] == "accelerator"} == pytest.approx(spent, rel=1e-3)
    assert {stage for stage, kind in seconds if kind == "cpu"} >= {"encode", "sample", "decode", "judge", "write"}
    one = {name: next(iter(values.values())) for name, values in told.items() if len(values) == 1}
    assert one["ditmill_batches_in_flight"] == one["ditmill_samples_waiting_for_commit"] == 0
    assert one["ditmill_accelerator_seconds_per_accepted"] == pytest.approx(
        ended["allocated_accelerator_seconds"] / 3, rel=0.05
    )


def _scrape(port: int) -> Exported | None:
    """ditmill's metrics, by the names that our code gives them; None where nothing answers."""
    host = socket.gethostbyname(socket.gethostname())
    for name in ("127.0.0.1", host):
        try:
            with urllib.request.urlopen(f"http://{name}:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        found: Exported = defaultdict(dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_ditmill_"):
                    ours = ("dataset", "verdict", "stage", "kind")
                    labels = tuple((key, sample.labels[key]) for key in ours if key in sample.labels)
                    found[sample.name.removeprefix("ray_")][labels] = sample.value
        return dict(found)
    return None


def _wait_for(condition: object, seconds: float) -> None:
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.5)


def _env(world: Path, *packages: str) -> dict[str, str]:
    """With tests/faults/own_judge.py, and the folder that it looks at."""
    path = os.pathsep.join([*packages, str(REPO / "tests" / "faults")])
    return {**os.environ, "PYTHONPATH": path, "DITMILL_TEST_WORLD": str(world)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
