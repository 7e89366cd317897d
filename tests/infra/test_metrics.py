from __future__ import annotations

import json

import pytest

from infra import metrics
from infra.errors import UserError
from infra.telemetry import configure


@pytest.mark.parametrize("asked", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(metrics.PORT, asked)
    with pytest.raises(UserError, match=r"DITMILL_METRICS_PORT: expected a port, 1 to 65535, found"):
        metrics.export_port()


def test_metrics_that_cannot_be_served_are_told_in_a_line_that_names_the_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(metrics.PORT, "8090")
    monkeypatch.setattr("ray._private.utils.get_dashboard_dependency_error", lambda: ImportError("opencensus"))
    configure()
    assert metrics.export_port() == 8090
    (line,) = capsys.readouterr().err.splitlines()
    assert "DITMILL_METRICS_PORT=8090" in line and "pip install -e .[telemetry]" in json.loads(line)["event"]


def test_nobody_asked_for_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metrics.PORT, raising=False)
    assert metrics.export_port() is None
