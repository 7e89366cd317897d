"""A bad network before an S3 server: a proxy that injects faults, each at its own rate, and counts what passes.

Requests go on as they came, with the client's Host and signature; bodies are not looked into.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ON_CEPH = os.environ.get("DITMILL_TEST_S3") == "ceph"
"""Whether the server is Ceph, as in tests/conftest.py: it checks signatures, and keeps times."""

KINDS = ("error", "slow_down", "reset", "stall", "truncated", "lost")
"""500; 503; a reset before the request is heard; no answer for `stall` seconds, half of the time with the request carried
out; a body that ends half-way; and a write that is carried out, whose answer never comes."""

WRITES = ("PUT", "POST", "DELETE")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}
REFUSALS = {"error": (500, "InternalError"), "slow_down": (503, "SlowDown")}


@dataclass(frozen=True)
class Seen:
    """One request that was answered, and the bytes of bodies that went each way."""

    method: str
    path: str
    headers: dict[str, str]
    status: int
    received: int
    sent: int

    @property
    def key(self) -> str:
        return urlsplit(self.path).path


@dataclass
class Gate:
    """Lets the first objects of a kind be written; writes of others wait until it is opened."""

    part: str
    """Of the keys that it holds up."""
    first: int
    opened: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._through: set[str] = set()
        self._lock = threading.Lock()

    def pass_through(self, method: str, path: str) -> None:
        if method in WRITES and self.part in path and not self._is_let(urlsplit(path).path):
            self.opened.wait()

    def _is_let(self, key: str) -> bool:
        with self._lock:
            if len(self._through) < self.first:
                self._through.add(key)
            return key in self._through


@dataclass
class Faults:
    """What goes wrong: the share of each kind among the requests that it can befall."""

    share: float = 0.0
    kinds: tuple[str, ...] = KINDS
    stall: float = 3.0
    seed: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    seen: list[Seen] = field(default_factory=list)
    once: list[tuple[str, str, str]] = field(default_factory=list)
    """Faults that are due: (kind, method, part of the path), each for the next request that fits."""
    gate: Gate | None = None

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._lock = threading.Lock()

    def draw(self, method: str, path: str) -> str:
        """The fault of this request, or nothing."""
        with self._lock:
            fault = self._due(method, path) or self._drawn(method)
            if fault:
                self.injected[fault] += 1
            return fault

    def coin(self) -> bool:
        with self._lock:
            return self._rng.random() < 0.5

    def _due(self, method: str, path: str) -> str:
        for due in self.once:
            if due[1] == method and due[2] in path:
                self.once.remove(due)
                return due[0]
        return ""

    def _drawn(self, method: str) -> str:
        drawn = self._rng.random()
        for kind in self.kinds:
            if (kind == "lost" and method not in WRITES) or (kind == "truncated" and method != "GET"):
                continue
            drawn -= self.share
            if drawn < 0:
                return kind
        return ""


@contextmanager
def s3_proxy(upstream: str, faults: Faults) -> Iterator[str]:
    """URL of a proxy before the server at `upstream`."""

    class Handler(_Handler):
        pass

    Handler.upstream, Handler.faults = urlsplit(upstream).netloc, faults
    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="s3 proxy", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is nothing to tell of."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    upstream: str
    faults: Faults

    def _answer(self) -> None:
        body = self._body()
        if self.faults.gate:
            self.faults.gate.pass_through(self.command, self.path)
        fault = self.faults.draw(self.command, self.path)
        if fault in REFUSALS:
            self._refuse(*REFUSALS[fault])
        elif fault == "reset":
            self._reset()
        elif fault == "stall":
            if self.faults.coin():
                self._pass_on(body)
            time.sleep(self.faults.stall)
            self._reset()
        else:
            status, headers, data = self._pass_on(body)
            if fault == "lost":
                self._reset()
            else:
                self._send(status, headers, data, cut=fault == "truncated", received=len(body))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                connection.putheader(name, value)
        if body or self.command in ("PUT", "POST"):
            connection.putheader("Content-Length", str(len(body)))
        connection.putheader("Connection", "close")
        connection.endheaders(body or None)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data

    def _send(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool, received: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        said = {name.lower(): value for name, value in headers}.get("content-length", str(len(data)))
        if status != 204:
            self.send_header("Content-Length", said if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            data = b""
        if cut:
            data = data[: len(data) // 2]
        self.wfile.write(data)
        self.faults.seen.append(Seen(self.command, self.path, dict(self.headers), status, received, len(data)))
        if cut:
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _reset(self) -> None:
        """Close so that the other side is told of a reset, not of an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        pass
