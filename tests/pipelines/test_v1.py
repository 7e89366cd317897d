"""The dataset of schema version 1 that is kept in tests/data/v1: every later version reads, extends and verifies it.

Neither it nor these tests change with the code. A test that fails here says that existing datasets break.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.commit import Committer, write_part
from infra.media import decode
from infra.schema import SAMPLES, TABLES
from infra.storage import Storage
from infra.tables import Table, read_dataset_json
from infra.vacuum import vacuum
from pipelines.annotate import withdraw
from pipelines.decisions import read_decisions
from pipelines.release import release
from pipelines.verify import verify

DATA = Path(__file__).parents[1] / "data"
EXPECTED: dict[str, Any] = json.loads((DATA / "v1.json").read_text(encoding="utf-8"))


@pytest.fixture
def v1(tmp_path: Path) -> Storage:
    """A copy, so that no test can change what the next one reads."""
    shutil.copytree(DATA / "v1", tmp_path / "v1")
    return Storage(str(tmp_path / "v1"))


def samples(storage: Storage) -> list[dict[str, Any]]:
    return Table(storage, "samples").read().to_pylist()


def test_v1_is_small():
    assert sum(path.stat().st_size for path in (DATA / "v1").rglob("*") if path.is_file()) < 300_000


def test_v1_columns_of_samples_are_frozen():
    """Parts hold exactly the columns that this version writes: new facts go to extra_json or to annotations."""
    for path in (DATA / "v1" / "samples").glob("*.parquet"):
        assert pq.read_schema(path).remove_metadata() == SAMPLES


def test_v1_lacks_a_table_that_came_later_and_reads_as_empty(v1):
    assert set(TABLES) - set(EXPECTED["rows"]) == {"embeddings", "sources"}
    assert Table(v1, "embeddings").read().num_rows == 0


@pytest.mark.parametrize("name", EXPECTED["rows"])
def test_v1_table_reads_with_the_schema_of_today(v1, name):
    found = Table(v1, name).read()
    assert found.schema.remove_metadata() == TABLES[name]
    assert found.num_rows == EXPECTED["rows"][name]
    parts = [pq.read_table(path) for path in Path(v1.path(name)).glob("*.parquet")]
    for column in parts[0].column_names:
        before = sorted(json.dumps(value, default=str) for part in parts for value in part[column].to_pylist())
        assert sorted(json.dumps(value, default=str) for value in found[column].to_pylist()) == before


def test_v1_says_what_it_said(v1):
    rows = samples(v1)
    assert {row["sample_id"]: row["verdict"] for row in rows} == EXPECTED["verdicts"]
    assert {row["sample_id"]: row["caption"] for row in rows} == EXPECTED["captions"]
    assert [row["error_type"] for row in Table(v1, "failures").read().to_pylist()] == EXPECTED["failures"]
    assert read_dataset_json(v1)["schema_version"] == 1


def test_v1_media_are_there_and_decode(v1):
    for row in samples(v1):
        items = [*row["media"], *row["tensors"]]
        data = [v1.read_bytes(item["shard"], item["offset"], item["offset"] + item["nbytes"]) for item in items]
        assert [hashlib.sha256(one).hexdigest() for one in data] == EXPECTED["media"][row["sample_id"]]
        if row["verdict"] == "accepted":
            frames = decode(data[0], items[0]["member"].rsplit(".", 1)[-1])
            assert frames.shape == (row["num_frames"], row["height"], row["width"], 3)


def test_v1_keeps_its_promises(v1):
    assert list(verify(v1)) == []


def test_v1_decisions_are_what_they_were(v1):
    found = {at: json.loads(json.dumps(asdict(one))) for at, one in read_decisions(v1).items()}
    for sample_id, before in EXPECTED["decisions"].items():
        assert {key: found[sample_id][key] for key in before} == before
    assert found.keys() == EXPECTED["decisions"].keys()


@pytest.mark.parametrize("pack_bytes", [None, 20_000])
def test_v1_is_released(v1, pack_bytes):
    decisions = EXPECTED["decisions"]
    verdicts = {at: decisions.get(at, {}).get("verdict") or verdict for at, verdict in EXPECTED["verdicts"].items()}
    withdrawn = {at for at, one in decisions.items() if one["withdrawn"]}
    previews = {
        at for at, verdict in verdicts.items() if verdict == "accepted" and EXPECTED["verdicts"][at] == "rejected"
    }
    wanted = {at for at, verdict in verdicts.items() if verdict == "accepted"} - withdrawn - previews
    made = release(v1, "again", pack_bytes=pack_bytes)
    parts = [pq.read_table(v1.path(item["path"])) for item in made.files if item["path"].endswith(".parquet")]
    rows = {row["sample_id"]: row for part in parts for row in part.to_pylist()}
    assert set(rows) == wanted
    assert made.without_media == len(previews) == 1
    for at, one in decisions.items():
        if at in rows:
            assert rows[at]["label"] == one["label"]
            if "short" in one["captions"]:
                assert rows[at]["caption"] == one["captions"]["short"]
    assert list(verify(v1)) == []


def test_v1_is_extended(v1):
    row = samples(v1)[0] | {
        "sample_id": "f" * 32,
        "run_id": "20270101t000000-ffffff",
        "media": [],
        "verdict": "rejected",
    }
    row["tensors"] = []
    committer = Committer(Table(v1, "samples"), row["run_id"])
    part = write_part(v1, f"samples/{row['run_id']}-0.parquet", pa.Table.from_pylist([row], SAMPLES))
    assert committer.commit([part]).rows == 1
    withdraw(v1, ["f" * 32])
    assert read_decisions(v1)["f" * 32].withdrawn
    assert len(samples(v1)) == EXPECTED["rows"]["samples"] + 1
    assert list(verify(v1)) == []


def test_v1_has_nothing_to_vacuum(v1):
    before = sorted(v1.files())
    assert vacuum(v1, older_than=-60) == []
    assert sorted(v1.files()) == before


def test_v1_parts_are_read_by_hugging_face(v1, tmp_path):
    import datasets

    found = datasets.load_dataset(
        "parquet", data_files=v1.path("samples/*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(found["sample_id"]) == sorted(EXPECTED["verdicts"])
    assert {row["sample_id"]: row["caption"] for row in found} == EXPECTED["captions"]
    first = next(row for row in found if row["verdict"] == "accepted")
    assert {score["name"] for score in first["scores"]} >= {"prompt_match", "sharpness"}
    assert first["tensors"][0]["shape"][0] == 16


def test_v1_has_a_report_and_a_card(v1):
    from pipelines.card import write_card
    from pipelines.report import build_report

    build_report(v1)
    write_card(v1)
    assert v1.exists("report/index.html")
    assert v1.exists("README.md")
