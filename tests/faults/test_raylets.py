"""A run grows over a cluster, which loses a raylet and gets another: what that costs, told by the samplers themselves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Launch, write_spec

from infra.storage import Storage
from infra.tables import Table
from pipelines.verify import verify

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
BATCH = 2
IN_HAND = 3 * BATCH
"""Samples that a node takes with it: the batch that it is at, and what the judge on another node has yet to take."""
RECOVERY_SECONDS = 90.0

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
env = {"PYTHONPATH": sys.argv[1], "DITMILL_TEST_DEVICE": sys.argv[2]}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "env_vars": env})
node = cluster.add_node(num_cpus=2, env_vars=env)
print(cluster.address, node.node_id, flush=True)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
sys.stdin.readline()
print(cluster.add_node(num_cpus=2, env_vars=env).node_id, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


class Begun(NamedTuple):
    """A sample that a sampler began."""

    at: float
    node: str
    key: str


def test_a_run_grows_and_a_raylet_is_killed_and_another_added_while_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    command = [sys.executable, "-c", CLUSTER, str(REPO / "tests" / "faults" / "device"), str(notes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cluster:
        assert cluster.stdin is not None and cluster.stdout is not None
        address, lost = cluster.stdout.readline().split()
        spec = write_spec(
            tmp_path / "data.yaml",
            prompts={"inline": [f"thing {at}" for at in range(4000)], "near_duplicates": "ignore"},
            layout={"batch_size": BATCH},
            sampler={"num_inference_steps": 20},
            score={"reject_static": False, "reject_duplicates": False},
            compute={
                "ray_address": address,
                "actors": {"sample": [1, 2], "judge": 1},
                "resources": {"sample": {"cpus": 1.5}, "judge": {"cpus": 0.25}},
            },
        )
        launch = Launch(["run", str(spec)], tmp_path / "log")
        try:
            _until(launch, notes, lambda found: len({each.node for each in found}) == 2 and len(found) > 8)
            struck = time.time()
            print(file=cluster.stdin, flush=True)
            _until(launch, notes, lambda found: sum(each.at > struck + 1 for each in found) > 8)
            added_at = time.time()
            print(file=cluster.stdin, flush=True)
            added = cluster.stdout.readline().strip()
            _until(launch, notes, lambda found: any(each.node == added for each in found))
            time.sleep(2)
            assert (
                subprocess.run([Path(sys.executable).with_name("ditmill"), "stop", str(tmp_path / "data")]).returncode
                == 0
            )
            assert launch.wait() == 0, launch.said()
        finally:
            launch.stop()
            cluster.communicate(timeout=60)
    begun = _read(notes)
    storage = Storage(str(tmp_path / "data"))
    assert list(map(str, verify(storage))) == []
    rows = Table(storage, "samples").read(["noise_key", "run_id"]).to_pylist()
    (ended,) = (row for row in Table(storage, "runs").read().to_pylist() if row["event"] == "ended")
    assert ended["status"] == "stopped"
    canary, _ = Counter(each.key for each in begun).most_common(1)[0]
    counts = Counter(each.key for each in begun if each.key != canary)
    again = sum(count - 1 for count in counts.values())
    other = [struck, *(each.at for each in begun if each.node not in (lost, added) and struck < each.at < added_at)]
    longest = max(after - before for before, after in pairwise(other))
    recovery = next(each.at for each in begun if each.node == added) - added_at
    with capsys.disabled():
        print(
            f"\na raylet of two killed: {again} samples begun again of {len(counts)}; the other group began"
            f" {len(other) - 1} in the {added_at - struck:.1f} s without it, its longest pause {longest:.1f} s;"
            f" the group on a new raylet began {recovery:.1f} s after that was added"
        )
    assert {row["noise_key"] for row in rows} <= {*counts, canary}
    assert again <= IN_HAND
    assert recovery < RECOVERY_SECONDS
    assert longest < RECOVERY_SECONDS / 3


def _until(launch: Launch, notes: Path, holds: object, seconds: float = 180) -> None:
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds(_read(notes)):
        assert not launch.ended and time.monotonic() < end, launch.said()
        time.sleep(0.2)


def _read(notes: Path) -> list[Begun]:
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    found = [line.split() for line in lines]
    return [Begun(float(at), node, key) for at, node, key in (each for each in found if len(each) == 3)]
