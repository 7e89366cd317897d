"""The process of a temporary Prefect server: `prefect_server.py SOCKET PARENT`, an inherited socket's number and a pid."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

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


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    serve(socket.socket(fileno=int(sys.argv[1])))
