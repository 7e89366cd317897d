"""A cluster of two raylets, of which one computes wrongly: it is taken out, the run goes on, and nothing of it is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.storage import Storage
from infra.tables import Table
from pipelines.verify import verify

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
SAMPLES = 120

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
gpus = int(sys.argv[3])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": gpus, "include_dashboard": False})
env = {"PYTHONPATH": sys.argv[1], "DITMILL_TEST_DEVICE": sys.argv[2]}
bad = cluster.add_node(num_cpus=2, num_gpus=gpus, env_vars=env)
print(cluster.address, bad.node_id, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def _cluster(how: str, gpus: int) -> Iterator[tuple[str, str]]:
    """Its address, and the id of the node whose workers compute wrongly. GPUs are names that Ray hands out."""
    command = [sys.executable, "-c", CLUSTER, str(REPO / "tests" / "faults" / "device"), how, str(gpus)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cluster:
        assert cluster.stdout is not None
        address, bad = cluster.stdout.readline().split()
        try:
            yield address, bad
        finally:
            cluster.communicate(timeout=60)


@pytest.mark.parametrize(
    ("how", "resources", "keys", "why"),
    [
        ("twisted", {"sample": {"gpus": 1}, "judge": {"gpus": 0}}, {}, "the canary"),
        ("worn", {}, {"guards": {"max_failed": 0.4, "window": 16, "canary": False}}, "guards.max_failed"),
    ],
)
def test_a_device_that_computes_wrongly_is_taken_out_and_the_run_ends_without_it(
    how: str, resources: dict[str, Any], keys: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with _cluster(how, int(bool(resources))) as (address, bad):
        compute = {"ray_address": address, "resources": resources}
        result = _run(tmp_path, compute=compute, **keys)
    storage = Storage(str(tmp_path / "data"))
    assert list(map(str, verify(storage))) == []
    assert result["status"] == "exhausted"
    assert result["accepted"] + result["failed"] == SAMPLES
    (run,) = (row for row in Table(storage, "runs").read().to_pylist() if row["event"] == "ended")
    told = json.loads(run["extra_json"])
    device = f"{bad}/gpu0" if resources else f"{bad}/cpu"
    assert list(told["taken_out"]) == [device]
    assert why in told["taken_out"][device]
    if how == "twisted":
        assert result["failed"] == 0
        made_by = {actor["devices"] for actor in told["actors"] if actor["devices"]}
        assert made_by and not any(devices.startswith(bad) for devices in made_by)
    else:
        assert 0 < result["failed"] <= 32


def _run(folder: Path, **keys: Any) -> dict[str, Any]:
    spec = {
        "name": "bad-device",
        "prompts": {"inline": [f"thing {at}" for at in range(SAMPLES)], "near_duplicates": "ignore"},
        "generators": [{"model": "pack://tiny"}],
        "layout": {"batch_size": 2},
        "sampler": {"num_inference_steps": 20},
        "judge": {"backend": "none"},
        "score": {"reject_duplicates": False, "reject_static": False},
        "caption": None,
        "output": {"uri": str(folder / "data"), "commit_every": 0.5},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | keys), encoding="utf-8")
    command = [sys.executable, "-m", "flows.cli", "run", str(path), "--json"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]
