"""What a command takes together with all that it starts: CPU-seconds over time and peak memory, process by process.

Linux only. The meter makes itself the subreaper of what it starts, so that daemons (Ray's, Prefect's server) stay in its
tree when their parents end, and looks at /proc a few times a second. What a process does between the last look and its end
is counted where its parent waits for it; the kernel's own sum for the whole tree is kept beside ours.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
TICK = 1.0 / os.sysconf("SC_CLK_TCK")
LOOK_EVERY = 0.1


@dataclass
class Process:
    """One process: CPU-seconds (user and system) at Unix times, and the most memory of its own, MiB."""

    pid: int
    command: str
    times: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    def cpu_at(self, moment: float) -> float:
        """CPU-seconds up to a Unix time, straight between two looks."""
        at = bisect.bisect_right(self.times, moment)
        if at == 0:
            return 0.0
        if at == len(self.times):
            return self.cpu[-1]
        before, after = self.times[at - 1], self.times[at]
        return self.cpu[at - 1] + (self.cpu[at] - self.cpu[at - 1]) * (moment - before) / (after - before)

    @property
    def kind(self) -> str:
        """What it is to a reader of the figures."""
        return next((kind for word, kind in KINDS.items() if word in self.command), "other")


KINDS = {
    "raylet/raylet": "raylet",
    "gcs_server": "gcs",
    "StageActor": "stage actors",
    "ray::Mailbox": "mailbox",
    "ray::IDLE": "idle workers",
    "Agent": "agents",
    "ray::": "Ray's own actors",
    "ray/dashboard": "dashboard",
    "ray/_private": "ray other",
    "ray/autoscaler": "autoscaler",
    "prefect.server": "Prefect's server",
    "flows.cli": "driver",
    "tests.bench": "the process",
}


@dataclass(frozen=True)
class Measured:
    """One command, from its start to the end of the last process that it started. Times are Unix seconds."""

    returncode: int
    stdout: str
    began: float
    ended: float
    processes: tuple[Process, ...]
    waited_seconds: float
    """CPU-seconds as the kernel adds them up for processes whose parents waited for them."""

    @property
    def cpu_seconds(self) -> float:
        return self.cpu_at(self.ended)

    def cpu_at(self, moment: float) -> float:
        return sum(process.cpu_at(moment) for process in self.processes)

    def by_kind(self, start: float, end: float) -> dict[str, float]:
        """CPU-seconds between two moments by kind of process, largest first."""
        found: dict[str, float] = {}
        for process in self.processes:
            found[process.kind] = found.get(process.kind, 0.0) + process.cpu_at(end) - process.cpu_at(start)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> Measured:
    """Run `command` to its end and that of its children; its stdout is kept, its stderr goes where ours does."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    waited = _waited()
    began = time.time()
    seen: dict[tuple[int, str], Process] = {}
    over = threading.Event()
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=cwd, start_new_session=True)
    watcher = threading.Thread(target=_watch, args=(seen, over), daemon=True)
    watcher.start()
    try:
        stdout, _ = popen.communicate()
        _reap()
    finally:
        _end_all()
        over.set()
        watcher.join()
    return Measured(popen.returncode, stdout, began, time.time(), tuple(seen.values()), _waited() - waited)


def _watch(seen: dict[tuple[int, str], Process], over: threading.Event) -> None:
    while not over.wait(LOOK_EVERY):
        for pid, start, cpu in _descendants(os.getpid()):
            process = seen.get((pid, start))
            if process is None:
                process = seen[pid, start] = Process(pid, "")
            process.times.append(time.time())
            process.cpu.append(cpu)
            if len(process.times) % 5 == 1:
                # Ray's workers change their title when they are given something to do.
                process.command = _command(pid) or process.command
                process.peak_mib = max(process.peak_mib, _own_mib(pid))


def _descendants(root: int) -> Iterator[tuple[int, str, float]]:
    """Pid, start time and CPU-seconds of every process below `root`."""
    children: dict[int, list[tuple[int, str, float]]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as file:  # noqa: PTH123
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        cpu = (int(fields[11]) + int(fields[12])) * TICK
        children.setdefault(int(fields[1]), []).append((int(name), fields[19], cpu))
    below = [root]
    while below:
        for found in children.get(below.pop(), []):
            below.append(found[0])
            yield found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _own_mib(pid: int) -> float:
    """Resident memory, MiB, without what is shared with other processes through shared memory (Ray's object store)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) / 1024


def _reap(seconds: float = 20.0) -> None:
    """Wait for what the command left behind to end by itself."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.05)


def _end_all() -> None:
    """Nothing that was started stays."""
    for pid, _, _ in list(_descendants(os.getpid())):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    _reap(5.0)


def _waited() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
