from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.telemetry import configure
from infra.traces import traces

REPO = Path(__file__).parents[2]
TELEMETRY = Path(os.environ.get("DITMILL_TEST_TELEMETRY") or Path(sys.prefix, "telemetry"))
"""Where `make test` puts the extra `telemetry` (see tests/pipelines/test_observe.py)."""


def _step(stage: str, began: float, ended: float) -> dict[str, Any]:
    return {"stage": stage, "began": began, "ended": ended, "accelerator_seconds": 2.0, "cpu_seconds": 1.5}


def test_a_batch_is_one_trace_with_a_span_for_each_stage_and_no_prompt(tmp_path: Path) -> None:
    if not TELEMETRY.is_dir():
        pytest.skip(f"the extra `telemetry` is not at {TELEMETRY}; `make test` puts it there")
    entries = [
        {"group": "sample", "actor": "node-1", "steps": [_step("encode", 10.0, 11.0), _step("sample", 11.0, 15.5)]},
        {"group": "judge", "actor": "node-2", "steps": [_step("write", 20.0, 21.0)]},
    ]
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(TELEMETRY)])}
    command = [sys.executable, str(REPO / "tests" / "infra" / "one_trace.py"), str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (request,) = json.loads(done.stdout)
    (resource,) = request["resourceSpans"]
    spans = {span["name"]: span for span in resource["scopeSpans"][0]["spans"]}
    assert spans.keys() == {"batch", "encode", "sample", "write"}
    assert len({span["traceId"] for span in spans.values()}) == 1
    root = spans.pop("batch")
    assert "parentSpanId" not in root
    assert {span["parentSpanId"] for span in spans.values()} == {root["spanId"]}
    assert (int(root["startTimeUnixNano"]), int(root["endTimeUnixNano"])) == (10_000_000_000, 30_000_000_000)
    assert int(spans["sample"]["endTimeUnixNano"]) == 15_500_000_000
    told = {item["key"]: item["value"] for item in root["attributes"]}
    assert told == {
        "ditmill.batch_index": {"intValue": "7"},
        "ditmill.sample_ids": {"arrayValue": {"values": [{"stringValue": "aa"}, {"stringValue": "bb"}]}},
    }
    assert "prompt" not in done.stdout


def test_traces_that_cannot_be_made_are_told_in_a_line_that_names_the_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    configure()
    assert traces("run-1", "watched") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install -e .[telemetry]" in json.loads(line)["event"]


def test_nobody_asked_for_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert traces("run-1", "watched") is None
