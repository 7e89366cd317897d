from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest

from infra.commit import Committer, FencedError, Part, write_part
from infra.control import Pulse, live_runs
from infra.schema import RUNS, SAMPLES
from infra.storage import Storage
from infra.tables import Table
from infra.vacuum import vacuum

LONG_AGO = time.time() - 7200


def write(storage: Storage, run_id: str, at: int, committed: bool = False) -> tuple[str, Part]:
    """A shard and its part."""
    shard = f"media/{run_id}/{at:08d}.tar"
    storage.write_bytes(shard, b"tar")
    row = {"sample_id": f"{run_id}-{at}", "run_id": run_id, "media": [{"role": "video", "shard": shard}]}
    committer = Committer(Table(storage, "samples"), run_id)
    part = write_part(storage, f"samples/{run_id}-{at}.parquet", pa.Table.from_pylist([row], SAMPLES))
    if committed:
        committer.commit([part])
    return shard, part


def end(storage: Storage, run_id: str, plan_file: str = "") -> None:
    row = {"run_id": run_id, "event": "ended", "plan_file": plan_file}
    committer = Committer(Table(storage, "runs"), run_id)
    committer.commit([write_part(storage, f"runs/{run_id}-ended.parquet", pa.Table.from_pylist([row], RUNS))])


def heartbeat(storage: Storage, run_id: str, stale: bool = False) -> None:
    Pulse(storage, run_id).beat("running", {}, force=True)
    if stale:
        (beat,) = (beat for beat in live_runs(storage) if beat.run_id == run_id)
        storage.write_bytes(f"control/{run_id}.json", json.dumps(asdict(replace(beat, renewed_at=LONG_AGO))).encode())


def test_vacuum_removes_what_an_ended_run_left_and_keeps_what_is_committed(storage):
    kept, part = write(storage, "run-a", 0, committed=True)
    left, lost = write(storage, "run-a", 1)
    end(storage, "run-a")
    assert vacuum(storage, dry_run=True) == sorted([left, lost.path])
    assert storage.exists(left)
    assert vacuum(storage) == sorted([left, lost.path])
    assert not storage.exists(left)
    assert storage.exists(kept)
    assert storage.exists(part.path)
    assert vacuum(storage) == []
    assert Table(storage, "samples").read().num_rows == 1


def test_vacuum_never_touches_files_of_a_live_run(storage):
    names = [name for at in range(2) for name in (write(storage, "run-a", at)[0], write(storage, "run-a", at)[1].path)]
    heartbeat(storage, "run-a")
    end(storage, "run-a")
    assert vacuum(storage, older_than=-60) == []
    assert all(storage.exists(name) for name in names)


def test_vacuum_fences_a_stale_run_before_it_removes_its_files(storage):
    zombie = Committer(Table(storage, "samples"), "run-a")
    shard, part = write(storage, "run-a", 0)
    heartbeat(storage, "run-a", stale=True)
    assert vacuum(storage, dry_run=True) == sorted([shard, part.path])
    assert [beat.run_id for beat in live_runs(storage)] == ["run-a"], "nothing is removed by looking"
    assert vacuum(storage) == sorted([shard, part.path])
    assert live_runs(storage) == []
    with pytest.raises(FencedError):
        zombie.commit([part])


def test_vacuum_leaves_what_is_young_and_has_no_known_run(storage):
    shard, part = write(storage, "run-a", 0)
    assert vacuum(storage) == []
    assert vacuum(storage, older_than=-60) == sorted([shard, part.path])


def test_vacuum_goes_by_age_on_disk(tmp_path):
    storage = Storage(str(tmp_path))
    old, young = "samples/run-a-0.parquet.1a2b3c4d.tmp", "samples/run-b-0.parquet.1a2b3c4d.tmp"
    others = ["dataset.json.1a2b3c4d.tmp", "control/run-a.json.1a2b3c4d.tmp", "control/run-z.stop", "plans/ab.parquet"]
    for name in (old, young, *others, "notes.tmp", "report/index.html"):
        storage.write_bytes(name, b"x")
        if name != young:
            os.utime(tmp_path / name, (LONG_AGO, LONG_AGO))
    assert vacuum(storage) == sorted([old, *others])
    assert sorted(storage.files()) == sorted([young, "notes.tmp", "report/index.html"])


def test_vacuum_keeps_plans_that_runs_name_and_all_while_one_lives(tmp_path):
    storage = Storage(str(tmp_path))
    for name in ("plans/used.parquet", "plans/unused.parquet"):
        storage.write_bytes(name, b"x")
        os.utime(tmp_path / name, (LONG_AGO, LONG_AGO))
    end(storage, "run-a", plan_file="plans/used.parquet")
    heartbeat(storage, "run-b")
    assert vacuum(storage) == []
    Pulse(storage, "run-b").end()
    assert vacuum(storage) == ["plans/unused.parquet"]


def test_vacuum_removes_releases_that_were_never_published(tmp_path):
    storage = Storage(str(tmp_path))
    kept = ["releases/v1/train-00000-aaaaaa.parquet", "releases/v1/manifest.json"]
    storage.write_bytes(kept[0], b"x")
    storage.write_bytes(kept[1], json.dumps({"files": [{"path": kept[0]}]}).encode())
    dead = ["releases/v1/train-00000-bbbbbb.parquet", "releases/v2/media/train-00000-bbbbbb.tar"]
    live = "releases/v2/train-00000-cccccc.parquet"
    for name in (*dead, live):
        storage.write_bytes(name, b"x")
        os.utime(Path(storage.path(name)), (LONG_AGO, LONG_AGO))
    heartbeat(storage, "20260101t000000-cccccc")
    assert vacuum(storage) == dead
    assert sorted(storage.files("releases")) == sorted([*kept, live])


def test_vacuum_of_an_empty_dataset(storage):
    assert vacuum(storage) == []
