"""Requests to a server that speaks the OpenAI API: how many at a time, how often again, how fast, and how many in all.

Worth another attempt are 408, 409, 425, 429, 5xx, silence, a broken connection and an answer that is no JSON: after a random
pause below a bound that doubles ("full jitter"). What the server says of its limits holds for all requests of a process:
`Retry-After`, and `x-ratelimit-reset-requests` or `-tokens` where `x-ratelimit-remaining-requests` is 0, or `-tokens` is less
than the last answer took. Redirects are not followed: the API key and the spec's list of places are for the server named.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp

from infra.errors import UserError
from infra.secrets import GONE, redact, refuse_credentials
from infra.telemetry import log

DEFAULT_KEY = "OPENAI_API_KEY"
ATTEMPTS = 8
FIRST_PAUSE = 0.5
"""Seconds that the pause after a first failure is below; it doubles with each, up to LONGEST_PAUSE."""
LONGEST_PAUSE = 30.0
LONGEST_WAIT = 300.0
"""Most seconds that are waited because a server says so, before each attempt."""

_AGAIN = {408, 409, 425, 429}
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


class EndpointError(ConnectionError):
    """The server failed as often as it was tried: nobody's sample is to blame, and the batch can be tried again."""


class RefusedError(ValueError):
    """The server will not answer this request (400, 413, 422, ...), whatever is asked again."""


class Store(Protocol):
    """Where answers are kept: `infra.storage.Storage`. `read_bytes` raises FileNotFoundError where there is nothing."""

    def read_bytes(self, name: str) -> bytes: ...
    def write_bytes(self, name: str, data: bytes) -> None: ...


@dataclass(frozen=True)
class EndpointRef:
    """Which model of which server, and what may be asked of it: picklable, and without the API key.

    Args:
        base_url: what comes before `/chat/completions`, such as https://api.openai.com/v1.
        model: its name there.
        api_key_env: environment variable that each process takes the API key from.
        concurrency: requests under way at a time, in each process.
        timeout: seconds without the whole answer after which a request is given up and tried again.
        max_requests: requests of each process, those that failed included; None: any number.
        max_total_tokens: tokens of each process, as the server counts them; None: any number.
        cache: where answers are kept; None: nowhere.
        section: of the spec, for errors.
    """

    base_url: str
    model: str
    api_key_env: str = DEFAULT_KEY
    concurrency: int = 8
    timeout: float = 120.0
    max_requests: int | None = None
    max_total_tokens: int | None = None
    cache: Store | None = None
    section: str = "judge"

    def __post_init__(self) -> None:
        refuse_credentials(f"{self.section}.base_url", self.base_url)

    @property
    def name(self) -> str:
        """What a row says of it: model@host."""
        return f"{self.model}@{urlsplit(self.base_url).netloc}"


class _TryAgain(Exception):
    """What went wrong, where another attempt may go well."""


class Client:
    """One process's requests to one endpoint. `open` it, `ask` within; one `open` at a time."""

    def __init__(self, ref: EndpointRef) -> None:
        """UserError where the API key that the spec names is not there, or is none."""
        self.ref = ref
        self.requests = self.tokens = 0
        self._url = f"{ref.base_url.rstrip('/')}/chat/completions"
        self._waits_until = 0.0
        self._last_tokens = 0
        self.answered = False
        self._over: UserError | EndpointError | None = None
        _headers(ref)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self._over = None
        self._slots = asyncio.Semaphore(self.ref.concurrency)
        limits = aiohttp.TCPConnector(limit=self.ref.concurrency)
        patience = aiohttp.ClientTimeout(total=self.ref.timeout)
        async with aiohttp.ClientSession(headers=_headers(self.ref), connector=limits, timeout=patience) as session:
            self._session = session
            yield

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of the server's answer to a chat completion.

        Raises UserError where the spec, the key or the budget is to blame, EndpointError where the server failed all attempts
        and then for every request that is still waiting, RefusedError where it refuses this one.
        """
        async with self._slots:
            why = ""
            for attempt in range(ATTEMPTS):
                if attempt:
                    log().info("endpoint asked again", endpoint=self.ref.name, attempt=attempt + 1, why=why)
                    await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))))
                while (wait := self._waits_until - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                if self._over is not None:
                    raise self._over
                try:
                    return await self._post(body)
                except _TryAgain as error:
                    why = str(error)
                except UserError as error:
                    self._over = error
                    raise
            said = f"{self.ref.section}.base_url: {self.ref.name} failed {ATTEMPTS} times, at last with: {why}"
            self._over = EndpointError(said)
            raise self._over

    async def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self._spend()
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                data = await response.read()
        except TimeoutError:
            raise _TryAgain(f"no answer within {self.ref.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _TryAgain(self._clean(f"{type(error).__name__}: {error}")) from None
        self._heed(response.headers, response.status)
        if response.status != 200:
            raise self._refusal(response.status, data)
        try:
            answer = json.loads(data)
            choice = answer["choices"][0]
            usage = answer.get("usage") or {}
            tokens = usage.get("total_tokens")
            if not isinstance(choice["message"], dict):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _TryAgain("an answer that is no chat completion in JSON") from None
        self.answered = True
        self._count(tokens)
        return dict(choice)

    def _spend(self) -> None:
        for key, spent, limit in (
            ("max_requests", self.requests, self.ref.max_requests),
            ("max_total_tokens", self.tokens, self.ref.max_total_tokens),
        ):
            if limit is not None and spent >= limit:
                raise UserError(
                    f"{self.ref.section}.{key}: this worker has spent {spent} of {limit}; raise it and run again, which goes"
                    " on: answers so far are kept"
                )
        self.requests += 1

    def _count(self, tokens: Any) -> None:
        if isinstance(tokens, int):
            self._last_tokens = tokens
            self.tokens += tokens
        elif self.ref.max_total_tokens is not None:
            raise UserError(
                f"{self.ref.section}.max_total_tokens: {self.ref.name} does not say how many tokens an answer took;"
                " take the key out, or use max_requests"
            )

    def _heed(self, headers: Mapping[str, str], status: int) -> None:
        """Hold all requests for as long as the server asks for."""
        waits = [_retry_after(headers.get("Retry-After", "")) if status != 200 else 0.0]
        for kind, least in (("requests", 1), ("tokens", max(1, self._last_tokens))):
            remaining = headers.get(f"x-ratelimit-remaining-{kind}", "")
            if remaining.isdecimal() and int(remaining[:18]) < least:
                waits.append(_duration(headers.get(f"x-ratelimit-reset-{kind}", "")))
        self._waits_until = max(self._waits_until, time.monotonic() + min(LONGEST_WAIT, max(waits)))

    def _refusal(self, status: int, data: bytes) -> Exception:
        """What to raise for a status that is not 200."""
        code, said = _said(data)
        where, said = self.ref.section, self._clean(said)
        if status in (401, 403):
            return UserError(
                f"{where}.api_key_env: {self.ref.name} answers {status} to the key in {self.ref.api_key_env}; put one there"
                " that it takes, on every machine that runs workers"
            )
        if code == "insufficient_quota":
            return UserError(
                f"{where}.base_url: {self.ref.name} says that the key's account has no quota left ({said})"
            )
        if status in _AGAIN or status >= 500:
            return _TryAgain(f"{status} {said}".strip())
        if status < 400:
            return UserError(
                f"{where}.base_url: {self.ref.base_url} answers {status}, which leads elsewhere; give that place's URL"
            )
        if status == 404:
            return UserError(
                f"{where}.base_url: {self.ref.base_url} has no /chat/completions, or no model {self.ref.model} ({said});"
                f" mend it or {where}.model"
            )
        return RefusedError(f"{self.ref.name} answers {status} ({said})")

    def _clean(self, text: str) -> str:
        """One short line of what others said, without the API key."""
        key = _key(self.ref)
        text = redact(text.replace(key, GONE) if key else text)
        return " ".join(text.split())[:200]


def _key(ref: EndpointRef) -> str:
    return os.environ.get(ref.api_key_env, "").strip()


def _headers(ref: EndpointRef) -> dict[str, str]:
    """With the key, if there is one: a server of one's own may need none."""
    key = _key(ref)
    if not key and ref.api_key_env != DEFAULT_KEY:
        raise UserError(
            f"{ref.section}.api_key_env: {ref.api_key_env} is not set where the worker runs; put the API key there"
        )
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"{ref.section}.api_key_env: what {ref.api_key_env} holds is no API key; put one there")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _said(data: bytes) -> tuple[str, str]:
    """Code and message of an error of the OpenAI API; of anything else its beginning."""
    try:
        error = json.loads(data)["error"]
        return str(error.get("code")), str(error.get("message"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", data[:1000].decode("utf-8", "replace")


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After header, which says seconds or a date; 0 where it says neither."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text.strip()):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())


def _duration(text: str) -> float:
    """Seconds of a duration such as 1s, 6m0s, 20ms or 7.66s; 0 where it is none."""
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(ms|s|m|h))+", text):
        return 0.0
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text))
