"""The whole way through real parts: the command, a Prefect server, two raylets, S3, files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
PLANNED = 120

TWO_RAYLETS = """
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
"""
KINDS_OF_NODES = """
other = cluster.add_node(num_cpus=2, num_gpus=1, resources={"accelerator_type:L4": 1})
wanted = cluster.add_node(num_cpus=2, num_gpus=1, resources={"accelerator_type:H100": 1})
print(cluster.address, other.node_id, wanted.node_id, flush=True)
"""
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 2, "include_dashboard": False}})
{nodes}
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def _cluster(nodes: str) -> Iterator[str]:
    """The line that `nodes` prints, which adds them to a Ray cluster of one raylet with two CPUs."""
    command = [sys.executable, "-c", CLUSTER.format(nodes=nodes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cluster:
        assert cluster.stdout is not None
        yield cluster.stdout.readline().strip()
        cluster.communicate(timeout=60)


@pytest.fixture(scope="module")
def two_raylets() -> Iterator[str]:
    """Address of a Ray cluster of two raylets, two CPUs each."""
    with _cluster(TWO_RAYLETS) as address:
        yield address


@pytest.fixture(scope="module")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the API of a Prefect server as a team runs it: with all its services, and there before and after the runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}/api"
    env = {**os.environ, "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "PREFECT_API_URL": url}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                try:
                    httpx.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield url
        finally:
            server.terminate()


def _ditmill(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, cwd=REPO, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


def _spec(path: Path, **keys: Any) -> str:
    spec = {
        "name": "whole-way",
        "layout": {"batch_size": 4},
        "sampler": {"num_inference_steps": 2},
        "caption": {"max_new_tokens": 8},
    }
    path.write_text(yaml.safe_dump(spec | keys), encoding="utf-8")
    return str(path)


def test_a_run_on_two_raylets_into_s3_through_prefect(
    tmp_path: Path, two_raylets: str, s3_endpoint: str, prefect_url: str
) -> None:
    uri = "s3://bucket/whole-way"
    spec = _spec(
        tmp_path / "spec.yaml",
        prompts={
            "inline": ["a red circle moving right", "a blue square spinning", "a green star bouncing"],
            "expand": {"variants": 2, "max_new_tokens": 8},
        },
        samples_per_prompt=2,
        output={"uri": uri, "commit_every": 1, "storage": {"endpoint_url": s3_endpoint, "allow_http": True}},
        compute={"ray_address": two_raylets, "split": "stages"},
    )
    where = {"PREFECT_API_URL": prefect_url, "AWS_ENDPOINT_URL": s3_endpoint}

    done = _ditmill("run", spec, "--json", **where)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["accepted"] + result["rejected"] + result["failed"] == 3 * 2 * 2
    assert result["verify"] == []
    progress = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert progress and {"accepted", "rejected", "failed", "samples_per_second"} <= progress[0].keys()

    again = _ditmill("run", spec, **where)
    assert again.returncode == 0
    assert "nothing to generate" in again.stderr

    changed = _ditmill("run", spec, "--set", "judge.thresholds={prompt_match: 0.9}", **where)
    assert "judge.thresholds" in changed.stderr and "ditmill annotate" in changed.stderr

    verified = _ditmill("verify", uri, **where)
    assert verified.returncode == 0, verified.stdout
    status = json.loads(_ditmill("status", uri, "--json", **where).stdout)
    assert status["samples"] == 12 and status["prompts"] == 6 and status["live"] == []

    from infra.storage import Storage
    from infra.tables import Table

    storage = Storage(uri, s3_endpoint, allow_http=True)
    ended = Table(storage, "runs").read().to_pylist()
    assert {row["event"] for row in ended} == {"started", "ended"}  # runs with nothing to do leave no trace
    page = storage.read_bytes("report/index.html").decode()
    assert page.count("data:video/mp4") >= result["accepted"]
    assert storage.read_bytes("README.md").startswith(b"---\n")

    runs = httpx.post(f"{prefect_url}/flow_runs/filter", json={}).json()
    assert [run["state"]["type"] for run in runs] == ["COMPLETED"]
    for _ in range(100):  # Prefect records them a moment later
        tasks = httpx.post(f"{prefect_url}/task_runs/filter", json={}).json()
        if len(tasks) >= 4:
            break
        time.sleep(0.1)
    assert len(tasks) == 4  # a few long tasks, never one a row
    kinds = {artifact["type"] for artifact in httpx.post(f"{prefect_url}/artifacts/filter", json={}).json()}
    assert {"progress", "table"} <= kinds


def test_two_runs_share_a_cluster_by_their_limits(tmp_path: Path, two_raylets: str, prefect_url: str) -> None:
    """Without limits the first takes all four CPUs, and the second waits for its end."""
    names = ("one", "two")
    specs = [
        _spec(
            tmp_path / f"{name}.yaml",
            name=name,
            prompts={"inline": [f"{name} {at}" for at in range(PLANNED)], "near_duplicates": "ignore"},
            generators=[{"model": "pack://tiny"}],
            sampler={"num_inference_steps": 10},
            judge={"backend": "none"},
            caption=None,
            score={"reject_static": False, "reject_duplicates": False},
            output={"uri": str(tmp_path / name), "commit_every": 0.5},
            compute={"ray_address": two_raylets, "limits": {"cpus": 2}},
        )
        for name in names
    ]
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda spec: _ditmill("run", spec, "--json", PREFECT_API_URL=prefect_url), specs))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr

    from infra.storage import Storage
    from infra.tables import Table

    rows = [Table(Storage(str(tmp_path / name)), "samples").read(["created_at"]) for name in names]
    assert [table.num_rows for table in rows] == [PLANNED, PLANNED]
    (began_one, ended_one), (began_two, ended_two) = (
        (min(times), max(times)) for times in (table["created_at"].to_pylist() for table in rows)
    )
    assert began_one < ended_two and began_two < ended_one


def test_actors_share_a_gpu_on_the_nodes_of_the_kind_that_is_asked_for(tmp_path: Path, prefect_url: str) -> None:
    """The GPUs are names only, which Ray hands out all the same; torch finds none and computes on the CPU."""
    with _cluster(KINDS_OF_NODES) as found:
        address, *_, wanted = found.split()
        spec = _spec(
            tmp_path / "spec.yaml",
            prompts={"inline": [f"thing {at}" for at in range(40)], "near_duplicates": "ignore"},
            generators=[{"model": "pack://tiny"}],
            judge={"backend": "none"},
            caption=None,
            score={"reject_static": False, "reject_duplicates": False},
            output={"uri": str(tmp_path / "data")},
            compute={
                "ray_address": address,
                "actors": {"sample": 2},
                "resources": {"sample": {"gpus": 0.5, "cpus": 0.5, "accelerator_type": "H100"}, "judge": {"gpus": 0}},
            },
        )
        done = _ditmill("run", spec, "--json", PREFECT_API_URL=prefect_url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted"] == 40

    from infra.storage import Storage
    from infra.tables import Table

    (ended,) = (
        row for row in Table(Storage(str(tmp_path / "data")), "runs").read().to_pylist() if row["event"] == "ended"
    )
    actors = [actor for actor in json.loads(ended["extra_json"])["actors"] if actor["devices"]]
    assert {actor["devices"] for actor in actors} == {f"{wanted}/gpu0"}
    assert [actor["accelerators"] for actor in actors] == [0.5, 0.5]


def test_images_to_video_from_records_with_their_own_first_frames(tmp_path: Path, tiny_image_to_video: str) -> None:
    from PIL import Image

    records = []
    for at, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
        records.append({"prompt": f"a {colour} wall", "first_frame": f"{colour}.png", "tags": [colour], "id": str(at)})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    spec = _spec(
        tmp_path / "spec.yaml",
        prompts={"path": str(tmp_path / "prompts.jsonl")},
        generators=[{"model": tiny_image_to_video}],
        output={"uri": str(tmp_path / "dataset"), "tensors": {"latents": "float32"}},
        judge={"backend": "none"},
    )
    done = _ditmill("run", spec, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accepted"] == 3

    from infra.storage import Storage
    from infra.tables import Table

    rows = Table(Storage(str(tmp_path / "dataset")), "samples").read().to_pylist()
    assert {row["tags"][0] for row in rows} == {"red", "green", "blue"}
    for row in rows:
        (given,) = row["inputs"]
        assert (
            given["role"] == "first_frame"
            and given["uri"].endswith(f"{row['tags'][0]}.png")
            and len(given["sha256"]) == 64
        )
        assert row["cost"] and sum(cost["accelerator_seconds"] for cost in row["cost"]) > 0

    one = rows[0]["sample_id"]
    made = _ditmill("regenerate", str(tmp_path / "dataset"), one, "--json")
    assert made.returncode == 0, made.stderr
    again = json.loads(made.stdout)
    assert (again["media"], again["latents"]) == ("same", "same")  # bit for bit, in another process and batch
