"""The whole way through real parts: the command, a Prefect server, two raylets, S3, files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def two_raylets() -> Iterator[str]:
    """Address of a Ray cluster of two raylets, two CPUs each."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as cluster:
        assert cluster.stdout is not None
        yield cluster.stdout.readline().strip()
        cluster.communicate(timeout=60)


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
