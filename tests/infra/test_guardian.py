"""The guardian's last act: nothing that carries its mark is left, even what starts while it looks or changes its title."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from infra.guardian import MARK, end, guarded, marked


def test_end_kills_processes_that_start_others_while_it_looks() -> None:
    mark = f"test-{os.getpid()}"
    busy = "while :; do sleep 30 & sleep 0.01; done"
    started = [subprocess.Popen(["sh", "-c", busy], env={**os.environ, MARK: mark}) for _ in range(3)]
    time.sleep(0.3)
    assert len(marked(mark)) > 3
    end(mark, grace=0.0)
    for shell in started:
        shell.wait(5)
    time.sleep(0.2)
    assert marked(mark) == []


def test_a_process_of_ray_is_found_after_it_has_changed_its_title() -> None:
    titled = "from ray._raylet import setproctitle; setproctitle('ray::Agent'); print(flush=True); input()"
    with guarded():
        process = subprocess.Popen([sys.executable, "-c", titled], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        assert process.pid in marked(os.environ[MARK])
        process.communicate(b"\n")
    assert MARK not in os.environ


def test_another_guardian_takes_the_place_of_one_that_was_killed() -> None:
    with guarded():
        mark = os.environ[MARK]
        (first,) = _guardians(mark)
        os.kill(first, signal.SIGKILL)
        began = time.monotonic()
        while not (found := _guardians(mark)) or found == [first]:
            assert time.monotonic() - began < 10
            time.sleep(0.05)
    assert _guardians(mark) == []


def _guardians(mark: str) -> list[int]:
    found = []
    for pid in marked(mark):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"guardian.py" in command:
            found.append(pid)
    return found
