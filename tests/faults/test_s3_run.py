"""A run into S3 over a bad network, killed half-way and run again: all promises hold, and nobody was told a secret."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from harness import Launch, kill_spec
from s3_proxy import KINDS, ON_CEPH, Faults, Gate

from infra.schema import TABLES
from infra.storage import Storage
from infra.tables import Table
from pipelines.verify import verify

pytestmark = pytest.mark.ray

PLANNED = 16

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIADISTINCTIVEKEY",
    "AWS_SECRET_ACCESS_KEY": "distinctive/Secret+Key",
    "AWS_SESSION_TOKEN": "distinctive//session==token",
}
if ON_CEPH:  # it takes the key pair, which tests/conftest.py made known to it, and no token that it did not hand out
    del SECRETS["AWS_SESSION_TOKEN"]


def test_a_run_into_s3_over_a_bad_network_is_killed_and_resumes(
    tmp_path: Path, bad_s3: Storage, faults: Faults, s3_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    faults.share, faults.stall = 0.05, 2
    faults.once.append(("lost", "PUT", "/samples/"))  # the others befall it by themselves
    faults.gate = Gate("/media/", PLANNED // 2 - 2)  # shards of two rows each: the run cannot end
    spec = kill_spec(tmp_path / "data.yaml")
    keys = yaml.safe_load(spec.read_text())
    reached = {"endpoint_url": bad_s3.endpoint_url, "allow_http": True, "timeout": 1}
    keys["prompts"]["inline"] = keys["prompts"]["inline"][:PLANNED]
    spec.write_text(yaml.safe_dump(keys | {"output": {**keys["output"], "uri": bad_s3.root, "storage": reached}}))
    good = Storage(bad_s3.root, s3_endpoint, allow_http=True)
    began = time.monotonic()
    killed = Launch(["run", str(spec)], tmp_path / "first.log", SECRETS)
    again = None
    try:
        while Table(good, "samples").read(["sample_id"]).num_rows < 2:
            assert not killed.ended, killed.said()
            time.sleep(0.5)
        assert killed.kill("driver")
        killed.wait()
        faults.gate.opened.set()
        assert killed.left_over() == []
        kept = Table(good, "samples").read(["sample_id"]).num_rows
        again = Launch(["run", str(spec)], tmp_path / "second.log", SECRETS)
        assert again.wait(300) == 0, again.said()
    finally:
        for launch in (killed, again):
            if launch:
                launch.stop()
    seconds, injected, answered = time.monotonic() - began, dict(faults.injected), len(faults.seen)
    assert 2 <= kept < PLANNED
    ids = Table(good, "samples").read(["sample_id"])["sample_id"].to_pylist()
    assert len(ids) == len(set(ids)) == PLANNED
    assert list(map(str, verify(good))) == []
    assert list(good.files("control")) == []
    assert injected.keys() == set(KINDS)
    assert _tellers(good, {"first.log": killed.said(), "second.log": again.said(), "stdout": again.stdout}) == []
    with capsys.disabled():
        methods = dict(Counter(seen.method for seen in faults.seen))
        print(
            f"\nkilled at {kept} of {PLANNED} rows: {answered} answers {methods} in {seconds:.0f} s, injected {injected}"
        )


def _tellers(storage: Storage, texts: dict[str, str]) -> list[str]:
    """Where a secret can be read: in a table, in any other object (the card and the report among them) or in a text."""
    found = {name: text.encode() for name, text in texts.items()}
    found |= {name: storage.read_bytes(name) for name in storage.files()}
    found |= {f"table {name}": repr(Table(storage, name).read().to_pylist()).encode() for name in TABLES}
    assert {"README.md", "report/index.html", "table runs"} <= found.keys()
    return [name for name, data in found.items() for secret in SECRETS.values() if secret.encode() in data]
