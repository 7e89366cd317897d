"""A server that speaks the OpenAI API for a judge such as that of `pack://shapes`, and fails when it is told to.

`python openai_server.py FOLDER` prints its port once the model is loaded. POST /control begins anew with what it holds,
{"queue": [...], "always": ..., "together": n, "refuse": text}: each reply of the queue is given once, to the next requests,
and then `always`, if there is one. A reply is

    {"status": 429, "headers": {...}, "body": "..."}     what to answer; left out: 200, none, the model's answer
    {"cut": true}                                        half of the body, and then the connection is closed
    {"stall": true}                                      no answer until the client has gone

`together` holds requests until so many are under way; one whose text holds `refuse` gets 400. GET /seen tells what came.
"""

from __future__ import annotations

import base64
import io
import json
import os
import select
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE = 60.0


class State:
    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.set({})

    def set(self, order: dict[str, Any]) -> None:
        with self.lock:
            self.queue = list(order.get("queue", []))
            self.always = order.get("always", {})
            self.together = order.get("together", 0)
            self.refuse = order.get("refuse", "\0")
            self.under_way = self.most = 0
            self.seen: list[dict[str, Any]] = []
            self.lock.notify_all()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    model: Any
    computing = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        with self.state.lock:
            self._send(200, json.dumps({"most": self.state.most, "requests": self.state.seen}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            self.state.set(body)
            self._send(200, "{}")
            return
        state = self.state
        with state.lock:
            state.under_way += 1
            state.most = max(state.most, state.under_way)
            seen = {"path": self.path, "at": time.monotonic(), "authorization": self.headers.get("Authorization")}
            text = body["messages"][0]["content"][-1]["text"]
            state.seen.append({**seen, "text": text, "temperature": body.get("temperature", 0)})
            reply = state.queue.pop(0) if state.queue else state.always
            if state.refuse in text:
                reply = {"status": 400, "body": '{"error": {"message": "content policy"}}'}
            if state.under_way >= state.together:
                state.together = 0
                state.lock.notify_all()
            state.lock.wait_for(lambda: not state.together, PATIENCE)
        if reply.get("stall"):
            select.select([self.connection], [], [], PATIENCE)  # readable once the client has closed it
            self.close_connection = True
        else:
            text = reply["body"] if "body" in reply else json.dumps(self._answer(body))
        with state.lock:  # before the client knows that it may send another one
            state.under_way -= 1
        if not reply.get("stall"):
            self._send(reply.get("status", 200), text, reply.get("headers", {}), cut=reply.get("cut", False))

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion by the model."""
        *images, text = body["messages"][0]["content"]
        frames = np.stack([_pixels(image["image_url"]["url"]) for image in images])[None]
        with self.computing:
            if body.get("logprobs"):
                choice = self._likeliest(frames, text["text"], body["top_logprobs"])
            elif body.get("response_format"):
                form = body["response_format"]["json_schema"]["schema"]
                (value,) = self.model.structured(frames, text["text"], form, 6, body["temperature"])
                choice = {"message": {"role": "assistant", "content": json.dumps(value)}}
            else:
                ((content,),) = self.model.answer(frames, [[text["text"]]], body["max_tokens"], body["temperature"])
                choice = {"message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        return {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}

    def _likeliest(self, frames: np.ndarray, text: str, count: int) -> dict[str, Any]:
        import torch

        ((_, logits),) = self.model._answers(frames, [[text]], None)
        found = torch.log_softmax(logits[0].double(), dim=-1).topk(count)
        top = [
            {"token": self.model.tokenizer.decode([token]), "logprob": value}
            for token, value in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        message = {"role": "assistant", "content": top[0]["token"]}
        return {"message": message, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


def _pixels(url: str) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


class Server:
    """The running server, as a test sees it."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root}/v1"

    def set(self, *queue: dict[str, Any], **order: Any) -> None:
        """Begin anew: see the module."""
        data = json.dumps({"queue": queue, **order}).encode()
        urllib.request.urlopen(f"{self.root}/control", data, timeout=PATIENCE).close()

    @property
    def most(self) -> int:
        """Most requests that were under way at a time."""
        return int(self._seen()["most"])

    @property
    def requests(self) -> list[dict[str, Any]]:
        return list(self._seen()["requests"])

    def _seen(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.root}/seen", timeout=PATIENCE) as answer:
            return dict(json.loads(answer.read()))


@contextmanager
def openai_server(folder: str) -> Iterator[Server]:
    """A server of the multimodal model in `folder`, in a process of its own."""
    command, env = [sys.executable, __file__, folder], {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            yield Server(int(process.stdout.readline()))
        finally:
            process.kill()


def main() -> None:
    from models.multimodal import Multimodal, MultimodalRef

    Handler.state, Handler.model = State(), Multimodal(MultimodalRef(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
