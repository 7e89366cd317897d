"""Which places a spec may name, and that no secret gets through one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from infra.secrets import holds_secret, redact
from pipelines.policy import Policy, refusal
from pipelines.records import read_records
from pipelines.sections import Prompts
from pipelines.spec import Bucket, parse_spec

ALLOWED = {"endpoints": ["https://minio.lab:9000", "files.lab"], "buckets": ["mine", "gs://theirs"]}


def spec(key: str, value: Any) -> dict[str, Any]:
    """A spec in which one dotted key has a value."""
    data: dict[str, Any] = {"policy": dict(ALLOWED), "prompts": {"inline": ["a cat"]}}
    if key.startswith("prompts.path"):
        data["prompts"] = {}
    node, (*parents, last) = data, key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return data


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("output.uri", "s3://other/set", "buckets"),
        ("output.uri", "simplecache::s3://other/set", "buckets"),
        ("output.storage.endpoint_url", "https://minio.lab:9001", "endpoints"),
        ("output.storage.endpoint_url", "https://minio.lab", "endpoints"),
        ("output.storage.endpoint_url", "https://minio.lab:9000.evil.org", "endpoints"),
        ("prompts.path", "s3a://mine.evil/a.txt", "buckets"),
        ("prompts.path", "gs://mine-too/a.txt", "buckets"),
        ("prompts.path", "https://evil.org/a.txt?files.lab", "endpoints"),
        ("prompts.path", "https://evil.org\\files.lab/a.txt", "endpoints"),
        ("prompts.path", "ftp://evil.org#@files.lab/a.txt", "endpoints"),
        ("prompts.path", "HTTPS://EVIL.org/a.txt", "endpoints"),
        ("prompts.exclude", ["a.txt", "ftp://evil.org/a.txt"], "endpoints"),
        ("prompts.expand", {"model": "https://evil.org/llm"}, "endpoints"),
        ("generators", [{"model": "s3://other/model"}], "buckets"),
        ("generators", [{"adapters": [{"uri": "https://evil.org/lora.safetensors"}]}], "endpoints"),
        ("judge.model", "gs://other/judge", "buckets"),
        ("caption.model", "s3://theirs/captioner", "buckets"),
        ("judge", {"backend": "openai", "model": "m", "base_url": "https://evil.org/v1"}, "endpoints"),
        ("caption", {"backend": "openai", "model": "m", "base_url": "https://minio.lab/v1"}, "endpoints"),
    ],
)
def test_what_is_outside_of_the_list_is_refused_in_one_line(key: str, value: Any, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_spec(spec(key, value), source="x.yaml")
    line = str(caught.value)
    assert line.startswith(f"x.yaml: {key}") and "\n" not in line
    assert f" is outside of policy.{kind} ({', '.join(ALLOWED[kind])}); " in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output.uri", "s3://mine/set"),
        ("output.uri", "s3a://mine"),
        ("output.uri", "out/s3"),
        ("output.storage.endpoint_url", "https://MINIO.lab:9000/"),
        ("prompts.path", "gs://theirs/a.txt"),
        ("prompts.path", "gs://mine/a.txt"),
        ("prompts.path", "http://files.lab:8080/a.txt?x=1"),
        ("prompts.path", "simplecache::https://files.lab/a.txt"),
        ("prompts.path", "file:///data/a.txt"),
        ("generators", [{"model": "pack://tiny"}, {"model": "org/model"}]),
    ],
)
def test_what_is_in_the_list_or_here_is_taken(key: str, value: Any) -> None:
    parse_spec(spec(key, value))


def test_without_lists_any_place_may_be_named() -> None:
    parse_spec(spec("prompts.path", "https://anywhere.org/a.txt") | {"policy": {"buckets": ["mine"]}})
    parse_spec(spec("prompts.path", "s3://anywhere/a.txt") | {"policy": {"endpoints": ["files.lab"]}})
    parse_spec(spec("output.uri", "s3://anywhere/a.txt") | {"policy": {}})


@pytest.mark.parametrize("entry", ["", "https://", "a b", "https://host/path", "host:port", "*"])
def test_an_entry_that_is_no_host_is_refused(entry: str) -> None:
    with pytest.raises(UserError, match=r"^spec: policy\.endpoints\.0: expected a text like "):
        parse_spec(spec("policy.endpoints", [entry]))


def test_an_override_cannot_step_around_the_list() -> None:
    with pytest.raises(UserError, match=r"output\.uri: s3://other/set is outside of policy\.buckets"):
        parse_spec(spec("output.uri", "s3://mine/set"), ["output.uri=s3://other/set"])


def test_a_record_whose_input_is_outside_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    rows = [
        {"prompt": "a", "image": "cat.png"},
        {"prompt": "b", "image": "s3://other/cat.png"},
        {"prompt": "c", "inputs": [{"role": "video", "uri": "https://evil.org/v.mp4", "sha256": "ab" * 32}]},
        {"prompt": "d", "image": "https://me:hunter2@files.lab/cat.png"},
        {"prompt": "e", "image": "https://files.lab/cat.png?X-Amz-Signature=5ecret&x=1"},
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    records = list(read_records(Prompts(path=str(path)), (Bucket(),), 0, policy=Policy(**ALLOWED)))
    assert [record.is_bad for record in records] == [False, True, True, True, True]
    reasons = [record.extra["bad_input"] for record in records[1:]]
    assert reasons[0].startswith("s3://other/cat.png is outside of policy.buckets (mine, gs://theirs); ")
    assert reasons[1].startswith("https://evil.org/v.mp4 is outside of policy.endpoints ")
    assert reasons[2].startswith("https://files.lab/cat.png holds credentials; ")
    assert "hunter2" not in repr(records) and "5ecret" not in repr(records)


SECRETS = (
    "https://me:hunter2@files.lab/a.txt",
    "https://hunter2@files.lab/a.txt",
    "s3://KEY:hunter2@mine/a.txt",
    "https://me:p@ss:hunter2@files.lab/a.txt",
    "https://files.lab/a.txt?X-Amz-Credential=hunter2%2F2026&X-Amz-Signature=hunter2",
    "https://files.lab/a.txt?a=1&token=hunter2",
    "https://files.lab/a.txt?sv=1&sig=hunter2",
    "https://files.lab/a.txt?Access_Token=hunter2#x",
)


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("key", ["prompts.path", "output.uri", "output.storage.endpoint_url", "judge.model"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(key: str, url: str) -> None:
    with pytest.raises(UserError, match=rf"^spec: {key}: .* holds credentials; .*environment only") as caught:
        parse_spec(spec(key, url) | {"policy": {}})
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", SECRETS)
def test_redact_leaves_nothing_of_a_secret(url: str) -> None:
    assert "hunter2" not in redact(f"before {url} after") and redact(f"before {url} after").endswith("after")
    assert "hunter2" not in redact(json.dumps({"a": url, "b": "me@home"})) and "me@home" in redact(
        json.dumps([url, "me@home"])
    )


@pytest.mark.parametrize(
    "text",
    [
        "s3://mine/a@b.txt",
        "abfs://box@account.dfs.core.windows.net/a",
        "github://org:repo@main/a.txt",
        "a ? token=1",
        "/a@b",
    ],
)
def test_what_is_no_secret_is_taken(text: str) -> None:
    assert not holds_secret(text) and refusal(text, Policy()) == ""


@pytest.mark.parametrize(
    "text", ["x" * 200_000, "://" * 70_000, "&token" * 40_000, "a://" + "@" * 200_000, "a" * 200_000 + "@"]
)
def test_redact_takes_no_longer_for_what_is_made_to_be_slow(text: str) -> None:
    before = time.process_time()
    redact(text)
    holds_secret(text)
    assert time.process_time() - before < 2
