"""What a run says where there is no terminal."""

from __future__ import annotations

import json

import pytest

from flows.console import Console
from infra.telemetry import bound
from pipelines.generate import Progress


def test_without_a_terminal_there_is_one_json_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = Console()
    progress = Progress(total=100, accepted=2, rejected=1, failed=1, first_done=2, first_result=10.0, last_result=14.0)
    with bound(run_id="20260101t000000-abcdef"):
        for _ in range(100):  # 25 seconds
            console.progress(progress)
            now += 0.25
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [json.loads(line) for line in captured.err.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line.pop("timestamp")
        assert line == {
            "event": "progress",
            "run_id": "20260101t000000-abcdef",
            "accepted": 2,
            "rejected": 1,
            "failed": 1,
            "committed": 0,
            "total": 100,
            "samples_per_second": 0.5,
            "seconds_left": 192,
        }
