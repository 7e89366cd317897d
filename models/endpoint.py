"""Judging and captioning by a model behind an OpenAI-compatible endpoint, such as `vllm serve`.

The same methods as `models.multimodal.Multimodal`. A clip is shown as a series of PNG images, the frames first and the
question last, and its first question is answered before the others are sent: a server that caches prefixes reads it once.

Answers are kept below `cache/answers/` of the dataset, one object a clip and model, and cost nothing a second time. It holds
the answers to all that the clip was asked, each under the sha256 of its request, in which the digest of the pixels stands for
the images: on an object store one small read and write a clip and stage, not one a question, and a rubric with one more
question pays for that one alone. Of two that write one object at the same time the later one stays: what the earlier one paid
for may be asked once more.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from models.endpoint_client import Client, EndpointError, EndpointRef, RefusedError
from models.structured import JSON_TIMES, is_strict, parsed

FOLDER = "cache/answers"

Answer = float | str | None
"""P(yes), None where it was neither yes nor no, NaN (which is not kept) where no probabilities came; or a text."""


@dataclass(frozen=True)
class _Task:
    """What is asked of each text: the request's parameters, and what of an answer is kept."""

    parameters: Mapping[str, Any]
    read: Callable[[dict[str, Any]], Answer]
    is_sound: Callable[[Any], bool]


@functools.cache
def load_endpoint(ref: EndpointRef) -> Endpoint:
    """The endpoint of `ref`, one for each process, which counts its requests. Asks nothing of the server.

    Raises UserError where the environment variable that should hold the API key does not.
    """
    return Endpoint(ref)


class Endpoint:
    """A model behind an endpoint.

    Its methods raise UserError where the spec, the key or the budget is to blame, EndpointError (an OSError) if the server
    failed as often as it was tried, and RefusedError (a ValueError) where it answers others and refuses a clip. What was
    answered until then is kept.
    """

    def __init__(self, ref: EndpointRef) -> None:
        self.ref = ref
        self.client = Client(ref)
        self._one = threading.Lock()
        self._has_logprobs = False

    def p_yes(self, frames: np.ndarray, questions: list[list[str]]) -> np.ndarray:
        """The probability of "yes" over "yes" and "no", however they are spelled, at the first position of the answer.

        `frames` is uint8 [n, T, H, W, 3] (images: T = 1), `questions` holds at most q texts for each clip. Returns
        float32 [n, q]; NaN where a clip has fewer, neither is among the 20 likeliest tokens, or an answer came without
        their probabilities.
        """
        parameters = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        task = _Task(parameters, self._p_yes, _is_probability)
        found = self._answers(frames, questions, task)
        if not self._has_logprobs and any(map(_is_nan, itertools.chain(*found))):
            raise UserError(
                f"{self.ref.section}.model: {self.ref.name} gives no logprobs, from which P(yes) is computed; choose a model"
                " that gives them"
            )
        p_yes = np.full((len(frames), max(map(len, questions), default=0)), np.nan, dtype=np.float32)
        for clip, row in enumerate(found):
            p_yes[clip, : len(row)] = np.array(row, dtype=np.float32)
        return p_yes

    def caption(self, frames: np.ndarray, instructions: list[str], max_new_tokens: int) -> list[list[str]]:
        """Answers to each instruction at temperature 0, for each clip: n lists of len(instructions) texts.

        `frames` is uint8 [n, T, H, W, 3].
        """
        return self.answer(frames, [instructions] * len(frames), max_new_tokens)

    def answer(
        self, frames: np.ndarray, texts: list[list[str]], max_new_tokens: int, temperature: float = 0.0
    ) -> list[list[str]]:
        """Answers to the texts asked of each clip; where the temperature is not 0, drawn with a fixed seed."""
        task = _Task(_free(max_new_tokens, temperature), _text, _is_text)
        return [[str(text) for text in row] for row in self._answers(frames, texts, task)]

    def structured(
        self,
        frames: np.ndarray,
        instruction: str,
        schema: Mapping[str, Any],
        max_new_tokens: int,
        temperature: float = 0.0,
    ) -> list[Any]:
        """What each clip's answer to the instruction says as JSON, which the server is asked to hold to `schema`; None where
        it is none. It may have `JSON_TIMES` as many tokens."""
        described = {"name": "caption", "schema": schema, "strict": is_strict(schema)}
        form = {"response_format": {"type": "json_schema", "json_schema": described}}
        task = _Task(_free(JSON_TIMES * max_new_tokens, temperature) | form, _text, _is_text)
        return [parsed(row[0]) for row in self._answers(frames, [[instruction]] * len(frames), task)]

    def _answers(self, frames: np.ndarray, texts: list[list[str]], task: _Task) -> list[list[Answer]]:
        """Answers to the texts asked of each clip."""
        # In a thread of its own: the caller's may have an event loop already. Its log lines are bound as the caller's.
        with self._one, ThreadPoolExecutor(1) as thread:
            return thread.submit(copy_context().run, asyncio.run, self._ask(frames, texts, task)).result()

    async def _ask(self, frames: np.ndarray, texts: list[list[str]], task: _Task) -> list[list[Answer]]:
        async with self.client.open():
            clips = (self._ask_clip(clip, row, task) for clip, row in zip(frames, texts, strict=True))
            done = await asyncio.gather(*clips, return_exceptions=True)
        try:
            _raise_gravest(done)
        except RefusedError as error:
            if self.client.answered:
                raise
            raise UserError(
                f"{self.ref.section}.base_url: {error}, and has answered nothing yet; mend the spec"
            ) from None
        return done  # type: ignore[return-value]

    async def _ask_clip(self, clip: np.ndarray, texts: list[str], task: _Task) -> list[Answer]:
        pixels = await asyncio.to_thread(_digest_of_clip, clip)
        digests = [self._digest(pixels, text, task) for text in texts]
        name = f"{FOLDER}/{_sha256([self.ref.base_url.rstrip('/'), self.ref.model, pixels])}.json"
        kept = await asyncio.to_thread(self._recall, name)
        known: dict[str, Answer] = {key: kept[key] for key in digests if key in kept and task.is_sound(kept[key])}
        self.client.answered |= bool(known)
        missing = {key: text for key, text in zip(digests, texts, strict=True) if key not in known}
        if missing:
            images = await asyncio.to_thread(_images, clip)

            async def ask(key: str) -> None:
                choice = await self.client.ask(self._request(images, missing[key], task))
                known[key] = task.read(choice)

            first, *rest = missing
            try:
                await ask(first)
                _raise_gravest(await asyncio.gather(*map(ask, rest), return_exceptions=True))
            finally:
                await asyncio.to_thread(self._keep, name, {**kept, **known}, kept)
        return [known[key] for key in digests]

    def _request(self, images: list[dict[str, Any]], text: str, task: _Task) -> dict[str, Any]:
        content = [*images, {"type": "text", "text": text.encode("utf-8", "replace").decode()}]
        return {"model": self.ref.model, "messages": [{"role": "user", "content": content}], **task.parameters}

    def _digest(self, pixels: str, text: str, task: _Task) -> str:
        """Of a request, with the pixels in place of the images."""
        return _sha256(self._request([{"type": "image_url", "image_url": {"url": pixels}}], text, task))

    def _recall(self, name: str) -> dict[str, Any]:
        """All that is kept of a clip; an object that is broken holds nothing."""
        if self.ref.cache is None:
            return {}
        try:
            found = json.loads(self.ref.cache.read_bytes(name))["answers"]
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keep(self, name: str, answers: dict[str, Any], before: dict[str, Any]) -> None:
        answers = {key: value for key, value in answers.items() if not _is_nan(value)}
        if self.ref.cache is not None and answers != before:
            data = json.dumps({"model": self.ref.name, "answers": answers}).encode()
            self.ref.cache.write_bytes(name, data)

    def _p_yes(self, choice: dict[str, Any]) -> Answer:
        try:
            likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
            mass = {"yes": 0.0, "no": 0.0}
            for item in likeliest:
                if (word := str(item["token"]).strip().casefold()) in mass:
                    mass[word] += math.exp(min(float(item["logprob"]), 0.0))  # NaN stays NaN
        except (KeyError, IndexError, TypeError, ValueError):
            return math.nan
        if not likeliest:
            return math.nan
        self._has_logprobs = True
        total = mass["yes"] + mass["no"]
        return mass["yes"] / total if total > 0 else None


def _free(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Parameters of an answer in as many tokens."""
    drawn = {"temperature": temperature, "seed": 0} if temperature else {"temperature": 0}
    return {**drawn, "max_tokens": max_new_tokens}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _text(choice: dict[str, Any]) -> str:
    content = str(choice["message"].get("content") or "")
    return " ".join(content.encode("utf-8", "replace").decode().split())


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _is_probability(value: Any) -> bool:
    return value is None or (isinstance(value, float) and 0 <= value <= 1)


def _raise_gravest(outcomes: Iterable[Any]) -> None:
    """Raise what went wrong, if something did: the user's mistake first, the server's failure next."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for kind in (UserError, EndpointError, OSError, BaseException):
        for error in errors:
            if isinstance(error, kind):
                raise error


def _images(clip: np.ndarray) -> list[dict[str, Any]]:
    """Frames, uint8 [T, H, W, 3], as parts of a message."""
    from PIL import Image

    parts = []
    for frame in clip:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _digest_of_clip(clip: np.ndarray) -> str:
    shape = "x".join(map(str, clip.shape))
    return f"sha256:{hashlib.sha256(np.ascontiguousarray(clip).data).hexdigest()}/{shape}"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
