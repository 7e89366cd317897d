"""A group of ranks ends as one: with the first that fails, when it is asked to, and with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from infra.ranks import run_ranks

REPO = Path(__file__).parents[2]


def test_ranks_know_their_places_and_rank_0_is_heard() -> None:
    code = "import os; print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MINE')))"
    heard: list[str] = []
    assert run_ranks([sys.executable, "-c", code], 2, heard.append, {"MINE": "x"}).code == 0
    assert heard == ["0 0 2 x"]


def test_one_that_fails_ends_all_and_its_last_words_are_kept() -> None:
    code = "import os, sys, time; sys.exit('it broke') if os.environ['RANK'] == '1' else time.sleep(600)"
    began = time.monotonic()
    ended = run_ranks([sys.executable, "-c", code], 2, lambda line: None, {})
    assert (ended.code, ended.rank, ended.tail) == (1, 1, "it broke")
    assert time.monotonic() - began < 60


def test_ranks_that_are_asked_to_stop_get_sigterm_and_time() -> None:
    code = (
        "import signal, time\n"
        "def stop(*_): print('stopped', flush=True); raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(600)"
    )
    heard: list[str] = []
    ended = run_ranks([sys.executable, "-c", code], 1, heard.append, {}, lambda: "ready" in heard)
    assert (ended.code, heard) == (0, ["ready", "stopped"])


def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(600)"
    parent = (
        f"import sys; from infra.ranks import run_ranks\nrun_ranks([sys.executable, '-c', {code!r}], 1, print, {{}})"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": str(REPO)})
    until = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    rank = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    while Path(f"/proc/{rank}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{rank}").exists()
