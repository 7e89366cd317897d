"""The ranks of one torch.distributed group as processes of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from infra.guardian import guarded

TAIL = 40
"""Lines of what a rank said last that are kept."""
GRACE_SECONDS = 300.0
"""That ranks which were asked to stop have to finish their step and write a state."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Ended:
    """How a group ended: the exit code of the first rank that failed, or 0, and the last lines it wrote to stderr."""

    code: int
    rank: int
    tail: str


def run_ranks(
    command: Sequence[str],
    world: int,
    say: Callable[[str], None],
    environment: Mapping[str, str],
    stop: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run `command` as `world` ranks to the end: where one fails, all end. `say` gets each line of rank 0's stdout.

    `stop` is asked all the time; once it says so, ranks get SIGTERM. They do not outlive this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with guarded():
        group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            _Rank(command, {**os.environ, **environment, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, say)
            for rank in range(world)
        ]
        try:
            return _wait(ranks, stop)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.wait()


class _Rank:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        # A session of its own: the terminal's Ctrl-C reaches this process alone, which then asks the ranks.
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        first = environment["RANK"] == "0"
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, say if first else None), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.tail.append), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: object, take: Callable[[str], None] | None) -> None:
        for line in stream:  # type: ignore[attr-defined]
            if take is not None:
                take(line.rstrip("\n"))

    def drain(self) -> None:
        for reader in self._readers:
            reader.join(timeout=5.0)


def _wait(ranks: list[_Rank], stop: Callable[[], bool]) -> Ended:
    asked: float | None = None
    while True:
        codes = [rank.process.poll() for rank in ranks]
        for at, code in enumerate(codes):
            if code:
                ranks[at].drain()
                return Ended(code, at, "\n".join(ranks[at].tail))
        if all(code == 0 for code in codes):
            for rank in ranks:
                rank.drain()
            return Ended(0, 0, "")
        if asked is None and stop():
            asked = time.monotonic()
            for rank in ranks:
                rank.process.send_signal(signal.SIGTERM)
        if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
            return Ended(-signal.SIGKILL, 0, "it did not stop in time")
        time.sleep(POLL_SECONDS)
