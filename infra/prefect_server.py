"""The process of a temporary Prefect server: `prefect_server.py SOCKET PARENT CACHE`.

SOCKET is an inherited socket's number, PARENT a pid, CACHE a folder for what can be made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import sqlite3
import sys
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process with the thread that started it, and end now if that is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def serve(listening: socket.socket) -> None:
    """Serve Prefect's API until told to stop."""
    import uvicorn

    application = "prefect.server.api.server:create_app"
    uvicorn.Server(uvicorn.Config(application, factory=True, log_level="error")).run(sockets=[listening])


def bring_database(home: Path, cache: Path) -> None:
    """Put an empty database into Prefect's `home`: making one takes four CPU-seconds, so that a copy is kept in `cache`."""
    database, kept = home / "prefect.db", cache / f"prefect-{version('prefect')}.db"
    if database.exists():  # of a server that died and is started again
        return
    if kept.exists():
        shutil.copyfile(kept, database)
        return
    from prefect.server.database import provide_database_interface

    asyncio.run(provide_database_interface().create_db())
    copy = kept.with_name(f"{kept.name}.{uuid4().hex[:8]}.tmp")
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(database)) as made, contextlib.closing(sqlite3.connect(copy)) as copied:
            made.backup(copied)
        copy.replace(kept)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    bring_database(Path(os.environ["PREFECT_HOME"]), Path(sys.argv[3]))
    serve(socket.socket(fileno=int(sys.argv[1])))
