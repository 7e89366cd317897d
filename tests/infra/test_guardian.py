"""The guardian's last act: nothing that carries its mark is left, even what starts while it looks."""

from __future__ import annotations

import os
import subprocess
import time

from infra.guardian import MARK, end, marked


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
