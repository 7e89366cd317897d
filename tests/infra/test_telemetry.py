"""Log lines are JSON, and carry what is bound where they are written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
import structlog

from infra.telemetry import bound, configure, log


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    configure(run_id="20260101t000000-abcdef", group="judge")
    yield
    configure()
    structlog.reset_defaults()


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_what_a_process_is_configured_with_is_in_the_lines_of_all_its_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    thread = threading.Thread(target=lambda: log().warning("sample failed", sample_id="00"))
    thread.start()
    thread.join()
    (line,) = _lines(capsys)
    assert line.pop("timestamp")
    assert line == {
        "event": "sample failed",
        "level": "warning",
        "run_id": "20260101t000000-abcdef",
        "group": "judge",
        "sample_id": "00",
    }


def test_what_is_bound_to_a_block_is_in_its_lines_only(capsys: pytest.CaptureFixture[str]) -> None:
    with bound(stage="score", run_id="another"):
        log().warning("within")
    log().warning("after", stage="write")
    within, after = _lines(capsys)
    assert (within["stage"], within["run_id"]) == ("score", "another")
    assert (after["stage"], after["run_id"]) == ("write", "20260101t000000-abcdef")


def test_lines_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    log().info("loaded")
    assert _lines(capsys) == []
