"""A Prefect server for one run: the one that PREFECT_API_URL names, or a temporary one that ends with this process.

Prefect's own temporary server outlives a SIGKILL of its parent and shares a home with every other; this one asks the kernel
to die with its parent and has a home of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from infra.telemetry import log

PR_SET_PDEATHSIG = 1
START_SECONDS = 90.0


@contextlib.contextmanager
def prefect_session() -> Iterator[None]:
    """A server starts in the background; what is inside must call `wait_until_up` before it uses Prefect.

    Prefect reads its settings when it is first imported: import it inside.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    home = Path(tempfile.mkdtemp(prefix="ditmill-prefect-"))
    port = _free_port()
    env = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "WARNING"),
        "DO_NOT_TRACK": "1",
    }
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    with (home / "server.log").open("w") as output:
        server = subprocess.Popen(
            _command(port), stdout=output, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent, start_new_session=True
        )
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(home, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def wait_until_up(seconds: float = START_SECONDS) -> None:
    """Wait for the server of PREFECT_API_URL to answer."""
    url = os.environ["PREFECT_API_URL"].rstrip("/") + "/health"
    began = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                log().info("prefect is up", seconds=round(time.monotonic() - began, 2))
                return
        except OSError as error:
            if time.monotonic() - began > seconds:
                raise TimeoutError(
                    f"the Prefect server at {url} did not answer in {seconds:.0f} s ({error})"
                ) from error
            time.sleep(0.1)


def _command(port: int) -> list[str]:
    factory = "prefect.server.api.server:create_app"
    return [sys.executable, "-m", "uvicorn", "--factory", factory, "--host", "127.0.0.1", "--port", str(port),
            "--log-level", "error"]  # fmt: skip


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
