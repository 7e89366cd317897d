"""verify finds each way in which stored bytes can break a promise, names it, and finds nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from infra.commit import write_part
from infra.schema import SAMPLES
from infra.storage import Storage
from infra.tables import Table
from pipelines.verify import Finding, verify

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    """A copy of the committed dataset: its promises hold."""
    shutil.copytree(DATA / "v1", tmp_path / "v1")
    return Storage(str(tmp_path / "v1"))


def _kinds(findings: list[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


def _first_media(dataset: Storage) -> dict[str, object]:
    rows = Table(dataset, "samples").read(["verdict", "media"]).to_pylist()
    return next(row["media"][0] for row in rows if row["verdict"] == "accepted")


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def flip_a_media_byte(dataset: Storage) -> None:
    media = _first_media(dataset)
    _flip(Path(dataset.path(str(media["shard"]))), int(str(media["offset"])) + 40)


def truncate_a_shard(dataset: Storage) -> None:
    media = _first_media(dataset)
    path = Path(dataset.path(str(media["shard"])))
    path.write_bytes(path.read_bytes()[: int(str(media["offset"])) + 10])


def delete_a_shard(dataset: Storage) -> None:
    Path(dataset.path(str(_first_media(dataset)["shard"]))).unlink()


def double_a_row(dataset: Storage) -> None:
    """As Delta's own append would: it does not look at keys."""
    from deltalake import write_deltalake

    table = Table(dataset, "samples")
    write_deltalake(dataset.delta_uri("samples"), table.read().slice(0, 1), mode="append")


def copy_a_part_in(dataset: Storage) -> None:
    part = Path(dataset.path(Table(dataset, "samples").files()[0]))
    shutil.copy(part, part.with_name("copied-by-hand.parquet"))


def delete_a_part(dataset: Storage) -> None:
    Path(dataset.path(Table(dataset, "samples").files()[0])).unlink()


def break_a_part(dataset: Storage) -> None:
    path = Path(dataset.path(Table(dataset, "samples").files()[0]))
    path.write_bytes(path.read_bytes()[:-20])


def lose_a_failure(dataset: Storage) -> None:
    table = Table(dataset, "failures").handle()
    assert table is not None
    assert table.delete()["num_deleted_rows"] > 0


def lose_a_sample(dataset: Storage) -> None:
    table = Table(dataset, "samples").handle()
    assert table is not None
    planned = _planned_ids(dataset)
    gone = next(i for i in Table(dataset, "samples").read(["sample_id"])["sample_id"].to_pylist() if i in planned)
    assert table.delete(f"sample_id = '{gone}'")["num_deleted_rows"] == 1


def lose_a_plan(dataset: Storage) -> None:
    for path in Path(dataset.path("plans")).iterdir():
        path.unlink()


def change_a_noise_key(dataset: Storage) -> None:
    from deltalake import write_deltalake

    rows = Table(dataset, "samples").read().to_pylist()
    rows[0]["noise_key"] = "0" * 32
    write_deltalake(dataset.delta_uri("samples"), pa.Table.from_pylist(rows, SAMPLES), mode="overwrite")


def change_a_verdict(dataset: Storage) -> None:
    from deltalake import write_deltalake

    rows = Table(dataset, "samples").read().to_pylist()
    rows[0]["verdict"] = "perhaps"
    write_deltalake(dataset.delta_uri("samples"), pa.Table.from_pylist(rows, SAMPLES), mode="overwrite")


def remove_dataset_json(dataset: Storage) -> None:
    dataset.delete("dataset.json")


def _planned_ids(dataset: Storage) -> set[str]:
    from pipelines.verify import enumeration_of

    runs = [
        row for row in Table(dataset, "runs").read().to_pylist() if row["event"] == "ended" and row["planned_through"]
    ]
    return {i for row in runs for chunk in enumeration_of(dataset, row).chunks() for i in chunk.sample_ids}


def test_verify_finds_nothing_where_every_promise_holds(dataset: Storage) -> None:
    assert list(verify(dataset)) == []


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (flip_a_media_byte, "media_changed"),
        (truncate_a_shard, "shard_short"),
        (delete_a_shard, "shard_missing"),
        (double_a_row, "doubled_row"),
        (copy_a_part_in, "part_not_in_log"),
        (delete_a_part, "part_missing"),
        (break_a_part, "part_broken"),
        (lose_a_failure, "sample_missing"),
        (lose_a_sample, "sample_missing"),
        (lose_a_plan, "plan_missing"),
        (change_a_noise_key, "noise_key"),
        (change_a_verdict, "verdict"),
        (remove_dataset_json, "no_dataset"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_verify_finds(harm: Callable[[Storage], None], kind: str, dataset: Storage) -> None:
    harm(dataset)
    findings = list(verify(dataset))
    assert kind in _kinds(findings)
    for finding in findings:
        assert finding.where and finding.detail


def test_verify_without_reading_media_still_finds_a_missing_shard(dataset: Storage) -> None:
    flip_a_media_byte(dataset)
    assert list(verify(dataset, read_media=False)) == []
    delete_a_shard(dataset)
    assert "shard_missing" in _kinds(list(verify(dataset, read_media=False)))


def test_verify_leaves_a_live_runs_files_alone(dataset: Storage) -> None:
    from infra.control import Pulse

    write_part(dataset, "samples/20990101t000000-abcdef-00000000-0.parquet", pa.Table.from_pylist([], SAMPLES))
    assert _kinds(list(verify(dataset))) == {"part_not_in_log"}
    Pulse(dataset, "20990101t000000-abcdef").beat("running", {}, force=True)
    assert list(verify(dataset)) == []
