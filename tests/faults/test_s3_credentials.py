"""What S3 is told by both of its clients: whose credentials, which encryption; and that nobody else is told a secret."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from s3_proxy import ON_CEPH, Faults, Seen

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.s3 import filesystem
from infra.schema import FAILURES
from infra.secrets import redact
from infra.storage import Storage
from infra.tables import Table
from pipelines.spec import parse_spec

SECRET = "wJalr/XUtnFEMI"
PROMPTS = {"prompts": {"inline": ["a dog"]}}


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with AWS configuration files, and no credentials in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def use(storage: Storage, run_id: str = "run-a") -> Committer:
    """One row, committed: s3fs writes its part, deltalake its log."""
    committer = Committer(Table(storage, "failures"), run_id)
    commit(committer, 0)
    return committer


def commit(committer: Committer, number: int) -> None:
    rows = pa.Table.from_pylist([{"sample_id": f"{number:032x}", "attempt": 1, "run_id": committer.run_id}], FAILURES)
    storage = committer.table.storage
    committer.commit([write_part(storage, f"failures/{committer.run_id}-{number}.parquet", rows)])


def said(seen: Seen, name: str) -> str:
    return next((value for key, value in seen.headers.items() if key.lower() == name), "")


def key_of(seen: Seen) -> str:
    return said(seen, "authorization").partition("Credential=")[2].partition("/")[0]


def test_both_clients_take_the_credentials_and_region_of_a_profile(bad_s3: Storage, faults: Faults, aws: Path) -> None:
    (aws / "config").write_text("[profile static]\nregion = eu-west-3\n")
    (aws / "credentials").write_text(f"[static]\naws_access_key_id = AKIASTATIC\naws_secret_access_key = {SECRET}\n")
    use(replace(bad_s3, profile="static"))
    assert {said(seen, "user-agent").split("/")[0] for seen in faults.seen} == {"aiobotocore", "object_store"}
    assert {key_of(seen) for seen in faults.seen} == {"AKIASTATIC"}
    assert all("/eu-west-3/s3/" in said(seen, "authorization") for seen in faults.seen)


@pytest.mark.skipif(ON_CEPH, reason="keys and session tokens that a real store did not hand out are refused")
def test_credentials_that_expire_are_renewed_within_a_run(bad_s3: Storage, faults: Faults, aws: Path) -> None:
    """A process hands out a new key each time it is asked, good for a minute, and botocore asks before they expire."""
    count, script = aws / "count", aws / "hand-out"
    script.write_text(
        f"#!/bin/sh\necho x >> {count}\nn=$(wc -l < {count})\n"
        f'echo "{{\\"Version\\": 1, \\"AccessKeyId\\": \\"AKIA$n\\", \\"SecretAccessKey\\": \\"{SECRET}\\",'
        f' \\"SessionToken\\": \\"token$n\\", \\"Expiration\\": \\"$(date -u -d "+60 seconds" +%Y-%m-%dT%H:%M:%SZ)\\"}}"\n'
    )
    script.chmod(0o755)
    (aws / "config").write_text(f"[profile renewed]\ncredential_process = {script}\n")
    committer = use(replace(bad_s3, profile="renewed"))
    commit(committer, 1)
    first, second = (
        seen
        for seen in faults.seen
        if seen.method == "PUT" and "_delta_log" in seen.path and "0000.json" not in seen.path
    )
    assert key_of(first) != key_of(second)
    for seen in (first, second):
        assert said(seen, "x-amz-security-token") == key_of(seen).replace("AKIA", "token")


def test_a_session_token_goes_with_no_other_key(
    bad_s3: Storage, faults: Faults, aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (aws / "credentials").write_text(f"[mixed]\naws_access_key_id = AKIAMIXED\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another key")
    with pytest.raises(UserError, match=r"^output\.storage\.profile: .* AWS_SESSION_TOKEN; unset it"):
        use(replace(bad_s3, profile="mixed"))


@pytest.mark.parametrize(("algorithm", "key"), [("AES256", None), ("aws:kms", "key-1"), (None, None)])
def test_both_clients_ask_for_encryption(algorithm: str, key: str | None, bad_s3: Storage, faults: Faults) -> None:
    storage = replace(bad_s3, server_side_encryption=algorithm, kms_key_id=key)
    use(storage)
    storage.create_bytes("dataset.json", b"{}")
    with storage.writing("a.tar") as file:
        file.write(bytes(17 * 2**20))
    written = [seen for seen in faults.seen if seen.method == "PUT" or seen.path.endswith("?uploads")]
    whole = [seen for seen in written if "partNumber" not in seen.path]
    assert len(whole) == 5 and any("_delta_log" in seen.path for seen in whole)
    for seen in whole:
        assert said(seen, "x-amz-server-side-encryption") == (algorithm or "")
        assert said(seen, "x-amz-server-side-encryption-aws-kms-key-id") == (key or "")


@pytest.mark.parametrize(
    ("path_style", "url"),
    [(None, "https://s3.test/bucket/x"), (True, "https://s3.test/bucket/x"), (False, "https://bucket.s3.test/x")],
)
def test_both_clients_put_the_bucket_where_the_spec_says(path_style: bool | None, url: str) -> None:
    storage = Storage("s3://bucket/x", "https://s3.test", path_style=path_style)
    assert storage.fs.sign("bucket/x").startswith(f"{url}?")
    host = storage.delta_options["aws_endpoint_url"]
    style = storage.delta_options["aws_virtual_hosted_style_request"]
    assert (host, style) == (
        ("https://bucket.s3.test", "true") if path_style is False else ("https://s3.test", "false")
    )


REFUSED = {
    "output.uri": f"s3://AKIAKEY:{SECRET}@bucket/data",
    "output.storage.endpoint_url": f"https://AKIAKEY:{SECRET.replace('/', '')}@s3.test",
    "prompts.path": f"s3://AKIAKEY:{SECRET}@bucket/prompts.jsonl",
    "generators.0.model": f"https://AKIAKEY:{SECRET.replace('/', '')}@models.test/m",
}


@pytest.mark.parametrize("key", REFUSED)
def test_credentials_in_a_url_of_a_spec_are_refused_in_one_line_without_them(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec: dict[str, object] = {} if key == "prompts.path" else dict(PROMPTS)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    line = refusal(["run", str(tmp_path / "spec.yaml"), "--set", f"{key}={REFUSED[key]}"], monkeypatch, capfd)
    assert key in line and "take them out" in line
    assert list(tmp_path.iterdir()) == [tmp_path / "spec.yaml"]


@pytest.mark.parametrize("command", ["verify", "status", "report", "vacuum"])
def test_credentials_in_the_url_of_a_dataset_are_refused_without_them(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "take them out" in refusal([command, REFUSED["output.uri"]], monkeypatch, capfd)
    monkeypatch.setenv("AWS_ENDPOINT_URL", REFUSED["output.storage.endpoint_url"])
    assert "endpoint_url" in refusal([command, "s3://bucket/data"], monkeypatch, capfd)


def test_a_profile_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = {**PROMPTS, "output": {"uri": "s3://bucket/data", "storage": {"profile": "nobody"}}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    line = refusal(["verify", str(tmp_path / "spec.yaml")], monkeypatch, capfd)
    assert "output.uri: s3://bucket/data cannot be reached (ProfileNotFound" in line


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    from flows.cli import main

    monkeypatch.setattr(sys, "argv", ["ditmill", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capfd.readouterr()
    for secret in ("AKIAKEY", *SECRET.split("/")):
        assert secret not in told.out + told.err
    (line,) = told.err.splitlines()
    return line


def test_a_storage_holds_no_secret_and_gives_none_away(bad_s3: Storage, aws: Path) -> None:
    import pickle

    (aws / "credentials").write_text(f"[kept]\naws_access_key_id = AKIAKEPT\naws_secret_access_key = {SECRET}\n")
    storage = replace(bad_s3, profile="kept")
    committer = use(storage)
    assert storage.delta_options["aws_secret_access_key"] == SECRET
    for given in (
        pickle.dumps(storage),
        repr(storage).encode(),
        repr(vars(committer)).encode(),
        repr(storage.fs).encode(),
    ):
        assert b"AKIAKEPT" not in given and SECRET.encode() not in given


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ({"kms_key_id": "key-1"}, "kms_key_id needs server_side_encryption: aws:kms"),
        ({"endpoint_url": "http://minio:9000"}, "set allow_http: true"),
        ({"server_side_encryption": "aes"}, "expected 'AES256' or 'aws:kms'"),
        ({"aws_secret_access_key": SECRET}, "unknown key"),
    ],
)
def test_storage_keys_that_do_not_go_together_are_refused(storage: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_spec({**PROMPTS, "output": {"storage": storage}})
    assert says in str(refused.value) and SECRET not in str(refused.value)


def test_a_spec_says_how_storage_is_reached() -> None:
    from pipelines.resolve import storage_of

    storage = {
        "path_style": False,
        "profile": "p",
        "server_side_encryption": "aws:kms",
        "kms_key_id": "k",
        "timeout": 5,
    }
    found = storage_of(parse_spec({**PROMPTS, "output": {"uri": "s3://bucket/x/", "storage": storage}}))
    assert found == Storage("s3://bucket/x", None, None, False, False, "p", "aws:kms", "k", 5.0)
    assert filesystem(found).config_kwargs["read_timeout"] == 5


def test_redact_takes_out_what_refuse_finds() -> None:
    for url in REFUSED.values():
        assert "AKIAKEY" not in redact(f"--set x={url}") and SECRET not in redact(url)
    for harmless in ("s3://bucket/a@b", "https://host:8080/x", "github://org:repo@main/x", "s3://arn:aws:s3:eu:1:ap/x"):
        Storage(harmless)
