"""A run whose judge and captioner are behind an endpoint that fails: what was answered once is never asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Launch, write_spec

from infra.storage import Storage
from infra.tables import Table
from models.source import resolve
from pipelines.verify import verify
from tests.models.openai_server import openai_server

pytestmark = pytest.mark.ray

KEY = "sk-distinctive-9876543210"
SAMPLES = 8
ASKED = ("prompt_match", "no_artefacts", "motion_smooth")
FAULTS: list[dict[str, Any]] = [
    {"status": 429, "headers": {"Retry-After": "1"}},
    {"status": 500},
    {"cut": True},
    {"body": '{"choices": ['},
    {"stall": True},
]


def firsts(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that ask for no second answer: four tokens make a caption near-empty, which is written once more."""
    return [request for request in requests if not request["temperature"]]


def test_a_run_that_spent_its_requests_goes_on_without_paying_twice(tmp_path: Path) -> None:
    with openai_server(resolve("pack://shapes", "judge")) as server:

        def run(**limits: Any) -> tuple[int, str, list[dict[str, Any]]]:
            """The exit code, the log, and what the server was asked."""
            where = {"backend": "openai", "base_url": server.base_url, "model": "shapes", "timeout": 20}
            spec = write_spec(
                tmp_path / "data.yaml",
                prompts={"inline": [f"thing {at}" for at in range(SAMPLES)], "near_duplicates": "ignore"},
                layout={"batch_size": 2},
                score={"reject_static": False, "reject_duplicates": False},
                judge={**where, **limits, "thresholds": dict.fromkeys(ASKED, 0.0)},
                caption={**where, "max_new_tokens": 4},
            )
            launch = Launch(["run", str(spec)], tmp_path / "log", {"OPENAI_API_KEY": KEY})
            try:
                return launch.wait(), launch.said(), server.requests
            finally:
                launch.stop()

        code, said, before = run(max_requests=9)
        assert code == 2 and "judge.max_requests: this worker has spent 9 of 9; raise it" in said
        server.set(*FAULTS)
        code, said, after = run()
        assert code == 0, said
        server.set()
        again = Launch(
            ["annotate", str(tmp_path / "data.yaml"), "--caption"], tmp_path / "log", {"OPENAI_API_KEY": KEY}
        )
        assert again.wait() == 0, again.said()
        assert len(firsts(server.requests)) == 2 * SAMPLES, "what is decoded from stored media has other pixels"
    storage = Storage(str(tmp_path / "data"))
    assert list(map(str, verify(storage))) == []
    rows = Table(storage, "samples").read(["judge", "verdict", "scores", "caption"]).to_pylist()
    assert len(rows) == SAMPLES and all({*ASKED} <= {each["name"] for each in row["scores"]} for row in rows)
    assert {row["judge"] for row in rows} == {f"shapes@{server.root.removeprefix('http://')}"}
    assert all(row["verdict"] == "accepted" and row["caption"] for row in rows)
    asked = len(firsts(before))
    assert 9 <= asked < asked + len(firsts(after)) - len(FAULTS) == (len(ASKED) + 2) * SAMPLES
    assert {request["authorization"] for request in [*before, *after]} == {f"Bearer {KEY}"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if KEY.encode() in path.read_bytes()]
