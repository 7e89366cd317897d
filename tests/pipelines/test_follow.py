"""What `ditmill report --live` sees of a run: by its heartbeat, and of a real one in another process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from flows.live import line, report_live, table
from infra.control import Pulse
from infra.storage import Storage
from pipelines.follow import Look, follow, look

if TYPE_CHECKING:
    from conftest import Runner

COUNTS: dict[str, Any] = {
    "accepted": 6,
    "rejected": 3,
    "failed": 1,
    "total": 40,
    "before_done": 10,
    "samples_per_second": 0.5,
    "accelerator_seconds": 30.0,
    "last_commit": 0.0,
}


def _beat(storage: Storage, counts: dict[str, Any]) -> Pulse:
    pulse = Pulse(storage, "20260101t000000-abcdef")
    pulse.beat("running", counts, force=True)
    return pulse


def test_a_look_tells_rate_cost_and_what_is_left(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=3)
    _beat(storage, COUNTS)
    (run,) = look(storage).runs
    assert (run.done, run.per_accepted) == (10, 5.0)
    assert run.seconds_left == pytest.approx((40 - 10 - 10) / 0.5, abs=2)
    assert line(run).endswith("running: done 20/40, accepted 6, rejected 3, failed 1, samples/s 0.50, s/accepted 5.00")


def test_a_run_that_reads_its_prompts_can_be_looked_at(dataset: Callable[..., Storage]) -> None:
    storage = dataset()
    _beat(storage, {})
    found = look(storage)
    assert (found.runs[0].total, found.runs[0].per_accepted, found.runs[0].seconds_left) == (None, None, None)
    assert table(found).row_count == 1


def test_following_ends_with_the_run(dataset: Callable[..., Storage]) -> None:
    storage = dataset()
    pulse = _beat(storage, COUNTS)
    looks: list[Look] = []
    for found in follow(storage, every=0.01):
        looks.append(found)
        if len(looks) == 3:
            pulse.end()
    assert [len(found.runs) for found in looks] == [1, 1, 1, 0]


def test_where_no_run_is_live_it_says_so(dataset: Callable[..., Storage], capsys: pytest.CaptureFixture[str]) -> None:
    storage = dataset()
    report_live(storage, every=1)
    assert capsys.readouterr().out == "no run is live\n"
    assert not storage.exists("report/index.html")


def test_a_page_that_is_followed_loads_itself_anew(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=1)
    pulse = _beat(storage, COUNTS)
    following = threading.Thread(target=report_live, args=(storage, 1, 0.05))
    following.start()
    while not storage.exists("report/index.html"):
        time.sleep(0.05)
    pulse.end()
    following.join()
    assert b'http-equiv="refresh" content="10"' in storage.read_bytes("report/index.html")


@pytest.mark.ray
def test_a_run_is_followed_to_its_end_from_another_process(tmp_path: Path, run: Runner) -> None:
    root = tmp_path / "data"
    spec = run.spec(root, {"inline": [f"thing {at}" for at in range(24)]}, layout={"batch_size": 1})
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "flows.cli", "report", str(root), "--live", "--every", "1"]
    following: list[subprocess.Popen[str]] = []

    def begin(progress: object) -> None:
        if not following:
            following.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
            )

    run(spec, report=begin)
    out, _ = following[0].communicate(timeout=60)
    assert following[0].returncode == 0
    first, *lines, last = out.splitlines()
    assert first.startswith("follow it at") and last.endswith("report/index.html")
    assert lines and all("running: done" in told for told in lines)
    assert 'http-equiv="refresh"' not in (root / "report" / "index.html").read_text(encoding="utf-8")
