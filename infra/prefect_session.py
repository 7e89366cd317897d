"""A Prefect server for one run: the one that PREFECT_API_URL names, or a temporary one that ends with this process.

Prefect's own temporary server outlives a SIGKILL of its parent and shares a home with every other; this one asks the kernel
to die with its parent and has a home of its own. One that dies is started again: what it did not know of is only progress.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from infra import prefect_server
from infra.telemetry import log

START_SECONDS = 90.0
STOP_SECONDS = 5.0


@contextlib.contextmanager
def prefect_session(cache: Path) -> Iterator[None]:
    """A server starts in the background; what is inside must call `wait_until_up` before it uses Prefect.

    Prefect reads its settings when it is first imported: import it inside. `cache` is a folder for what can be made again.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    home = Path(tempfile.mkdtemp(prefix="ditmill-prefect-"))
    # Bound here and inherited: no other process can take the port, not even while a server is started again.
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    env = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{listening.getsockname()[1]}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT__SERVER_WEBSERVER_ONLY": "1",  # what it keeps ends with the run
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "CRITICAL"),
        "DO_NOT_TRACK": "1",
    }
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    ending = threading.Event()
    # With the environment as it is now: what is set later (a guardian's mark) is not meant for the server.
    arguments = (listening, home, cache, dict(os.environ), ending)
    keeper = threading.Thread(target=_keep, args=arguments, name="prefect-server", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ending.set()
        keeper.join()
        listening.close()
        shutil.rmtree(home, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _keep(listening: socket.socket, home: Path, cache: Path, env: dict[str, str], ending: threading.Event) -> None:
    """Keep a server running. The kernel ends it with the thread that started it: this one, which stays to the end."""
    command = [sys.executable, "-P", prefect_server.__file__, str(listening.fileno()), str(os.getpid()), str(cache)]
    with (home / "server.log").open("ab") as output:
        pause = 1.0
        while True:
            server = subprocess.Popen(
                command,
                env=env,
                stdout=output,
                stderr=output,
                pass_fds=[listening.fileno()],
                start_new_session=True,
            )
            while server.poll() is None and not ending.wait(0.1):
                pass
            if not ending.is_set():
                log().warning("the Prefect server died and is started again", code=server.returncode)
                ending.wait(pause)
                pause = min(30.0, 2 * pause)
            if ending.is_set():
                break
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


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
            if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
                return  # it is there, and wants to know who asks
            if time.monotonic() - began > seconds:
                raise TimeoutError(
                    f"the Prefect server at {url} did not answer in {seconds:.0f} s ({error})"
                ) from error
            time.sleep(0.1)
