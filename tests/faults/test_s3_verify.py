"""What `verify` downloads from S3, counted at a proxy."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest
from s3_proxy import Faults

from infra.commit import Committer, write_part
from infra.schema import SAMPLES
from infra.storage import Storage
from infra.tables import Table
from models.noise import noise_key
from pipelines.verify import verify

V1 = Path(__file__).parents[1] / "data" / "v1"


@pytest.fixture
def dataset(bad_s3: Storage, faults: Faults) -> Storage:
    """The committed dataset on S3, its counters at zero."""
    for path in V1.rglob("*"):
        if path.is_file():
            bad_s3.write_bytes(path.relative_to(V1).as_posix(), path.read_bytes())
    faults.seen.clear()
    return bad_s3


def read(faults: Faults, folder: str) -> int:
    """Bytes of bodies of the answers to GET below a folder of the dataset."""
    return sum(seen.sent for seen in faults.seen if seen.method == "GET" and f"/{folder}/" in seen.key)


def test_verify_without_media_reads_no_byte_of_them(dataset: Storage, faults: Faults) -> None:
    assert list(map(str, verify(dataset, read_media=False))) == []
    assert read(faults, "media") == read(faults, "rejected") == 0
    assert read(faults, "samples") > 0


def test_verify_reads_of_the_media_what_rows_refer_to_and_once(dataset: Storage, faults: Faults) -> None:
    assert list(map(str, verify(dataset))) == []
    rows = Table(dataset, "samples").read(["media", "tensors"]).to_pylist()
    wanted = sum(item["nbytes"] for row in rows for item in (*row["media"], *row["tensors"]))
    assert read(faults, "media") + read(faults, "rejected") == wanted
    assert wanted < sum(dataset.size(name) for folder in ("media", "rejected") for name in dataset.files(folder))


def test_verify_reads_of_the_tables_the_columns_that_it_checks(bad_s3: Storage, faults: Faults) -> None:
    """Rows whose texts are most of their part: they are not downloaded."""
    bad_s3.write_bytes("dataset.json", b"{}")
    rng = random.Random(0)
    rows = [
        {
            "sample_id": f"{at:032x}",
            "prompt_id": f"{at:032x}",
            "seed": 0,
            "sample_index": 0,
            "noise_key": noise_key(0, f"{at:032x}", 0),
            "verdict": "rejected",
            "media": [],
            "tensors": [],
            "extra_json": rng.randbytes(20_000).hex(),
        }
        for at in range(200)
    ]
    part = write_part(bad_s3, "samples/run-a-0.parquet", pa.Table.from_pylist(rows, SAMPLES))
    assert part.nbytes > 3_000_000
    Committer(Table(bad_s3, "samples"), "run-a").commit([part])
    faults.seen.clear()
    assert list(map(str, verify(bad_s3))) == []
    assert 0 < read(faults, "samples") < part.nbytes / 4


def test_verify_survives_a_bad_network(dataset: Storage, faults: Faults) -> None:
    faults.share = 0.05
    assert list(map(str, verify(dataset))) == []
    assert sum(faults.injected.values()) >= 5


def test_verify_does_not_pass_over_what_storage_refuses_to_give(dataset: Storage, faults: Faults) -> None:
    """A part whose footer could be read, and whose columns could not."""
    path = Table(dataset, "samples").files()[0]
    whole, faults.seen[:] = dataset.read_bytes(path), []
    broken = bytearray(whole)
    broken[4:2000] = bytes(1996)  # the first pages of its first columns
    dataset.write_bytes(path, bytes(broken))
    assert {finding.kind for finding in verify(dataset, read_media=False)} >= {"part_broken"}
