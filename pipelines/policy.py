"""The policy of a spec: which places its URLs may name, and that none carries a secret. Asked before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from infra.secrets import holds_secret, redact
from pipelines.sections import Section

if TYPE_CHECKING:
    from pipelines.spec import Spec

ENDPOINT = r"^([a-z]+://)?([A-Za-z0-9_.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?/?$"
BUCKET = r"^([a-z0-9]+://)?[\w.@-]+/?$"
HERE = {"file", "local", "memory", "pack"}
STORES = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs", "gcs": "gs"} | {
    name: name for name in ("az", "abfs", "abfss", "adl", "wasb", "wasbs", "oss", "r2", "cos", "obs", "swift", "oci")
}
"""Schemes whose URLs begin with a bucket, and one name for those that mean the same. All others begin with a host."""

PORTS = {"http": 80, "https": 443}
_BUCKET = re.compile(r"[\w.-]+(@[\w.-]+)?")
_HOST = re.compile(r"([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:\d+)?")


class Policy(Section):
    """What is allowed."""

    licences: Literal["warn", "refuse", "ignore"] = Field(
        "warn", description="What to do when a model's licence may not let its outputs train others."
    )
    endpoints: tuple[Annotated[str, Field(pattern=ENDPOINT)], ...] = Field(
        (), description="Hosts that URLs may name, such as `host`, `host:port` or `https://host`; empty, any."
    )
    buckets: tuple[Annotated[str, Field(pattern=BUCKET)], ...] = Field(
        (), description="Buckets that URLs may name, such as `name` or `s3://name`; empty, any."
    )


def named_urls(spec: Spec) -> Iterator[tuple[str, str]]:
    """Key and value of all that a spec may name by a URL, but for the inputs of records."""
    for at, generator in enumerate(spec.generators):
        yield f"generators.{at}.model", generator.model
        if generator.teacher is not None:
            yield f"generators.{at}.teacher", generator.teacher
        for number, adapter in enumerate(generator.adapters):
            yield f"generators.{at}.adapters.{number}.uri", adapter.uri
    for name in [spec.judge.rubric] if isinstance(spec.judge.rubric, str) else spec.judge.rubric:
        yield "judge.rubric", name
    if spec.judge.decompose is not None and spec.judge.decompose.model is not None:
        yield "judge.decompose.model", spec.judge.decompose.model
    for name, bar in spec.judge.thresholds.items():
        if not isinstance(bar, float) and bar.labels is not None:
            yield f"judge.thresholds.{name}.labels", bar.labels
    for name, section in (("judge", spec.judge), ("judge.screen", spec.judge.screen), ("caption", spec.caption)):
        if section is not None:
            yield f"{name}.model", section.model
            if section.base_url is not None:
                yield f"{name}.base_url", section.base_url
    if spec.prompts.expand is not None:
        yield "prompts.expand.model", spec.prompts.expand.model
    if spec.prompts.path is not None:
        yield "prompts.path", spec.prompts.path
    for at, source in enumerate(spec.sources):
        yield f"sources.{at}.path", source.path
    for at, path in enumerate(spec.prompts.exclude):
        yield f"prompts.exclude.{at}", path
    if spec.notify.webhook is not None and not spec.notify.webhook.startswith("$"):
        yield "notify.webhook", spec.notify.webhook
    yield "output.uri", spec.output.uri
    if spec.output.storage.endpoint_url is not None:
        yield "output.storage.endpoint_url", spec.output.storage.endpoint_url


def refusal(url: str, policy: Policy) -> str:
    """Why a URL may not be opened, without its secrets; empty where it may."""
    if holds_secret(url):
        return f"{redact(url)} holds credentials; they come from the environment only, so take them out"
    return outside(url, policy)


def outside(url: str, policy: Policy) -> str:
    """Why the policy's lists do not have a URL, without its secrets; empty where they do."""
    for part in url.split("::"):  # fsspec's chains: simplecache::s3://bucket/name
        scheme, found, rest = part.partition("://")
        if not found or (scheme := scheme.lower()) in HERE:
            continue
        place = re.split(r"[/?#]", rest, maxsplit=1)[0].lower()
        kind, allowed = ("buckets", policy.buckets) if scheme in STORES else ("endpoints", policy.endpoints)
        fits = _bucket_fits if scheme in STORES else _host_fits
        if allowed and not fits(scheme, place, allowed):
            return (
                f"{redact(url)} is outside of policy.{kind} ({', '.join(allowed)}); use one of these, or add it there"
            )
    return ""


def _bucket_fits(scheme: str, bucket: str, allowed: Sequence[str]) -> bool:
    names = (f"{STORES[scheme]}://{bucket}", bucket)
    return bool(_BUCKET.fullmatch(bucket)) and any(_plain(item) in names for item in allowed)


def _host_fits(scheme: str, host: str, allowed: Sequence[str]) -> bool:
    host = host.rpartition("@")[2]
    if not _HOST.fullmatch(host):  # what parsers read in different ways names no host that is allowed
        return False
    return any(_same_host(scheme, host, _plain(item)) for item in allowed)


def _same_host(scheme: str, host: str, allowed: str) -> bool:
    wanted, found, place = allowed.rpartition("://")
    if found and wanted != scheme:
        return False
    one, other = urlsplit(f"//{host}"), urlsplit(f"//{place}")
    port, asked = (parts.port or PORTS.get(scheme) for parts in (one, other))
    return one.hostname == other.hostname and (port == asked or (not found and other.port is None))


def _plain(item: str) -> str:
    scheme, found, place = item.strip().lower().rpartition("://")
    return f"{STORES.get(scheme, scheme)}{found}{place.rstrip('/')}"
