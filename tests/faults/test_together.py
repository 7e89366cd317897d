"""Runs that meet: two on one dataset at once, and one on what another has finished."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from harness import Launch, Reference, Watched, kill_spec

from infra.storage import Storage

pytestmark = pytest.mark.ray


def test_two_runs_on_one_dataset_at_once_end_with_one_row_a_sample(tmp_path: Path, reference: Reference) -> None:
    spec = kill_spec(tmp_path / "data.yaml")
    launches = [Launch(["run", str(spec)], tmp_path / name) for name in ("first.log", "second.log")]
    try:
        for launch in launches:
            assert launch.wait(300) == 0, launch.said()
    finally:
        for launch in launches:
            launch.stop()
    Watched(Storage(str(tmp_path / "data"))).check(reference.latents)


@pytest.mark.parametrize("layout", ["layout.batch_size=3", "layout.threads=2", "compute.split=stages"])
def test_another_layout_plans_nothing_that_is_done(layout: str, tmp_path: Path, reference: Reference) -> None:
    """Neither Prefect nor Ray is started for it."""
    shutil.copytree(reference.dataset.storage.root, tmp_path / "data")
    rows = Watched(Storage(str(tmp_path / "data"))).rows()
    began = time.monotonic()
    launch = Launch(["run", str(kill_spec(tmp_path / "data.yaml")), "--set", layout], tmp_path / "log")
    while not launch.ended:
        assert launch.find("raylet") == launch.find("prefect") == []
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    assert launch.wait() == 0
    assert "nothing to generate" in launch.said()
    assert Watched(Storage(str(tmp_path / "data"))).rows() == rows
