"""Ends what a run leaves running, however the run has ended.

Ray's processes mostly end with their driver, but an agent that cannot report the end of its cluster stays for good. So a
run starts one small process that holds the other end of a pipe. When the pipe closes, it gives what the run started a
moment to go by itself and then kills it, whoever its parent is by now: each process carries a mark in its environment.
It also says what a process that is killed cannot say.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

MARK = "_DITMILL_SESSION"
KEEP_ENVIRONMENT = "SPT_NOENV"
"""Ray's processes write their titles over their environment, and so over the mark, unless this is set."""
GRACE_SECONDS = 5.0
KILLING_SECONDS = 10.0
QUIET_SECONDS = 0.5
GOODBYE = b"goodbye"


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Every process started inside ends soon after this block, or after this process. Where there is no /proc, nothing."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = {name: os.environ.get(name) for name in (MARK, KEEP_ENVIRONMENT)}
    mark = os.environ[MARK] = uuid4().hex
    os.environ[KEEP_ENVIRONMENT] = "1"
    # By its path and isolated: it imports nothing but the standard library. Inside of another the other speaks for it.
    command = [sys.executable, "-I", "-S", __file__, mark, *(["quiet"] if before[MARK] else [])]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    guardian, leaving = [start()], threading.Event()

    def keep() -> None:
        """Start another if somebody kills it."""
        while guardian[0].wait() is not None and not leaving.is_set():
            guardian[0] = start()

    threading.Thread(target=keep, name="guardian", daemon=True).start()
    try:
        yield
    finally:
        leaving.set()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            guardian[0].communicate(GOODBYE, GRACE_SECONDS + QUIET_SECONDS + 1)


def marked(mark: str) -> list[int]:
    """Processes that were started with the mark, but for this one."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended, or belongs to somebody else
                if wanted in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def end(mark: str, grace: float = GRACE_SECONDS) -> None:
    """Kill what carries the mark, after a grace, until nothing has carried it for a moment.

    One look is not enough: what is killed may just have started another process, and one between fork and exec shows no
    environment.
    """
    began = seen = time.monotonic()
    while (now := time.monotonic()) - seen < QUIET_SECONDS and now - began < grace + KILLING_SECONDS:
        if left := marked(mark):
            seen = now
        if now - began >= grace:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.stdin.buffer.read() != GOODBYE and "quiet" not in sys.argv:
        # Ray ends a driver at once, without a word, when its session is gone.
        line = "ditmill: the run was killed, or its Ray session was; run the same command again to resume"
        print(line, file=sys.stderr, flush=True)
    end(sys.argv[1])
