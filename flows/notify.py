"""Who is told how a run ended. A webhook that cannot be reached holds nothing up and fails no run."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import State
from prefect.client.schemas.objects import FlowRun

from flows.tick import go_on, may_go_on, pause_deployment
from infra.errors import UserError
from infra.secrets import redact
from infra.telemetry import log
from pipelines.policy import outside
from pipelines.schedule import Event, Notify
from pipelines.spec import Spec

ATTEMPTS = 3
TIMEOUT_SECONDS = 10.0
GO_ON_SECONDS = 10.0


def webhook_url(notify: Notify) -> str | None:
    """The URL, out of the environment where the spec says so. UserError where it is not there."""
    if notify.webhook is None or not notify.webhook.startswith("$"):
        return notify.webhook
    name = notify.webhook[1:]
    found = os.environ.get(name, "")
    if not found.startswith(("https://", "http://")):
        said = "is not set" if not found else "is no http(s) URL"
        raise UserError(f"notify.webhook: {name} {said} in the environment; set it to the webhook's URL")
    return found


def check_told(spec: Spec) -> None:
    """UserError where those who are to be told are not there, or may not be told."""
    url = webhook_url(spec.notify)
    if url is not None and (said := outside(url, spec.policy)):
        raise UserError(f"notify.webhook: {said}")
    if spec.notify.block is not None:
        _block(spec.notify.block)


def tell(notify: Notify, event: Event, facts: dict[str, Any]) -> None:
    """Tell the webhook and the block that the spec names, if it asks for this event."""
    if event not in notify.events:
        return
    if (url := webhook_url(notify)) is not None:
        _post(url, event, facts)
    if notify.block is not None:
        said = "\n".join(f"{key}: {value}" for key, value in facts.items() if value not in (None, "", []))
        try:
            _block(notify.block).notify(said, subject=f"ditmill: {facts['name']} {event}")
        except Exception as error:
            log().warning("the block could not be told", event_told=event, error=type(error).__name__)


def _block(name: str) -> Any:
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    try:
        found = Block.load(name)
    except Exception as error:
        raise UserError(
            f"notify.block: Prefect gives no block {name} ({type(error).__name__}); make it there"
        ) from error
    if not isinstance(found, NotificationBlock):
        raise UserError(f"notify.block: {name} is no notification block, such as slack-webhook/team")
    return found


def _post(url: str, event: Event, facts: dict[str, Any]) -> None:
    """POST `event` with `facts` as JSON."""
    body = json.dumps({"event": event, **facts}, ensure_ascii=False).encode()
    for attempt in range(ATTEMPTS):
        # The URL's scheme was checked with the spec.
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", "User-Agent": "ditmill"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return
        except OSError as error:
            # Not the URL: it is often a secret.
            log().warning(
                "the webhook could not be told", event_told=event, error=type(error).__name__, attempt=attempt
            )
            if attempt + 1 < ATTEMPTS:
                time.sleep(2.0**attempt)


class Paused(Exception):
    """A run that its guards ended: what it made is committed, and a person should look before it goes on."""


@contextmanager
def telling(spec: Spec) -> Iterator[dict[str, Any]]:
    """Tell how the block ended, with the facts that it puts into what this yields. Paused also pauses the deployment."""
    facts: dict[str, Any] = {"name": spec.name, "dataset": redact(spec.output.uri), "tick": spec.schedule.tick}
    check_told(spec)  # before anything is done
    try:
        yield facts
    except Paused as why:
        pause_deployment()
        tell(spec.notify, "paused", {**facts, "why": str(why)})
        raise
    except Exception as error:
        tell(spec.notify, "failed", {**facts, "why": redact(f"{type(error).__name__}: {error}")[:2000]})
        raise
    if facts.get("status") != "stopped":  # whoever stopped it knows, and what is preempted goes on
        tell(spec.notify, "finished", facts)


def crashed(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """In the worker, after a tick's process died: the tick goes on, and who wants to know is told.

    A moment later: a worker reports a crash twice, the second time after this.
    """
    if goes_on := may_go_on(flow_run):
        threading.Timer(GO_ON_SECONDS, go_on, (flow_run.id,)).start()
    spec = Spec.model_validate(flow_run.parameters["spec"])
    facts = {"name": spec.name, "dataset": redact(spec.output.uri), "tick": str(flow_run.expected_start_time)}
    why = f"its process died: {state.message}" + ("; it is scheduled again" if goes_on else "")
    tell(spec.notify, "failed", {**facts, "why": redact(why)[:2000]})
