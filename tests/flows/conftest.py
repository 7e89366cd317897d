"""A webhook, for those who are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Told = tuple[str, list[dict[str, Any]]]
"""URL of a webhook, and what it was told so far."""


@contextmanager
def _webhook() -> Iterator[Told]:
    told: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/told", told
        server.shutdown()


@pytest.fixture(scope="session")
def webhook() -> Callable[[], AbstractContextManager[Told]]:
    """Starts one."""
    return _webhook


@pytest.fixture
def hook() -> Iterator[Told]:
    with _webhook() as told:
        yield told
