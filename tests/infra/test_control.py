from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pyarrow as pa
import pytest

from infra import control
from infra.commit import Committer, FencedError, write_part
from infra.control import Heartbeat, Pulse, beating, live_runs, request_stop, sweep, sweep_stale, uncommitted_files
from infra.schema import SAMPLES
from infra.storage import Storage
from infra.tables import Table


def write_run(storage: Storage, run_id: str, committed: int, lost: int) -> tuple[list[str], list[str]]:
    """Shards and parts of a run, some committed and some not: the names of both."""
    kept: list[str] = []
    left: list[str] = []
    committer = Committer(Table(storage, "samples"), run_id)
    for at in range(committed + lost):
        shard = f"media/{run_id}/{at:08d}.tar"
        storage.write_bytes(shard, b"tar")
        row = {"sample_id": f"{run_id}-{at}", "run_id": run_id, "media": [{"role": "video", "shard": shard}]}
        part = write_part(storage, f"samples/{run_id}-{at}.parquet", pa.Table.from_pylist([row], SAMPLES))
        if at < committed:
            committer.commit([part])
        (kept if at < committed else left).extend((shard, part.path))
    return kept, left


def set_heartbeat(storage: Storage, beat: Heartbeat) -> None:
    storage.write_bytes(f"control/{beat.run_id}.json", json.dumps(asdict(beat)).encode())


def own_heartbeat(storage: Storage, run_id: str) -> Heartbeat:
    Pulse(storage, run_id).beat("running", {}, force=True)
    return next(beat for beat in live_runs(storage) if beat.run_id == run_id)


def test_heartbeat_of_a_live_process_is_not_stale(storage):
    assert not own_heartbeat(storage, "run-a").is_stale


def test_heartbeat_is_stale_after_sixty_seconds(tmp_path):
    beat = own_heartbeat(Storage(str(tmp_path)), "run-a")
    assert not replace(beat, renewed_at=time.time() - 55).is_stale
    assert replace(beat, renewed_at=time.time() - 65).is_stale


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="tells processes apart by /proc")  # noqa: PTH110
def test_heartbeat_of_a_killed_process_is_stale_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        beat = replace(
            own_heartbeat(Storage(str(tmp_path)), "run-a"),
            pid=child.pid,
            pid_started=control._process_started(child.pid),
        )
        assert not beat.is_stale
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not collected it
        assert beat.is_stale
    assert beat.is_stale
    assert replace(beat, pid=os.getpid()).is_stale, "another process of the same number"


def test_heartbeat_of_another_machine_goes_by_its_age_only(tmp_path):
    """Containers may share a host name, and their process numbers say nothing here."""
    beat = replace(own_heartbeat(Storage(str(tmp_path)), "run-a"), machine="elsewhere", pid=2**22 + 1)
    assert not beat.is_stale
    assert replace(beat, renewed_at=time.time() - 65).is_stale


def test_live_runs_reads_what_another_version_says(storage):
    said = asdict(own_heartbeat(storage, "run-a")) | {"something_new": 1}
    del said["machine"]
    storage.write_bytes("control/run-a.json", json.dumps(said).encode())
    assert [beat.run_id for beat in live_runs(storage)] == ["run-a"]


def test_beating_renews_and_hears_a_request_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(control, "RENEW_SECONDS", 0.02)
    storage, asked = Storage(str(tmp_path)), []
    with beating(Pulse(storage, "run-a"), "running", lambda: {"accepted": 3}, lambda: asked.append(1)):
        (first,) = live_runs(storage)
        assert (first.state, first.progress) == ("running", {"accepted": 3})
        request_stop(storage, "run-a")
        deadline = time.time() + 10
        while not (asked and live_runs(storage)[0].renewed_at > first.renewed_at):
            assert time.time() < deadline
            time.sleep(0.01)


def test_sweep_removes_what_was_not_committed_and_nothing_else(storage):
    kept, left = write_run(storage, "run-a", committed=2, lost=2)
    others, others_left = write_run(storage, "run-a2", committed=1, lost=1)  # its name begins with the other's
    half_written = "samples/run-a-9.parquet.1a2b3c4d.tmp"
    storage.write_bytes(half_written, b"PAR1")
    Pulse(storage, "run-a").beat("running", {}, force=True)
    assert set(sweep(storage, "run-a")) == {*left, half_written}
    assert not any(storage.exists(name) for name in left)
    assert all(storage.exists(name) for name in kept + others + others_left)
    assert live_runs(storage) == []
    assert uncommitted_files(storage, "run-a") == []
    assert set(uncommitted_files(storage)) == set(others_left)


def test_sweep_stale_fences_what_only_seemed_dead(storage):
    zombie = Committer(Table(storage, "samples"), "run-a")
    kept, left = write_run(storage, "run-a", committed=1, lost=1)
    set_heartbeat(storage, replace(own_heartbeat(storage, "run-a"), renewed_at=time.time() - 65))
    own_heartbeat(storage, "run-live")
    _, live_left = write_run(storage, "run-live", committed=0, lost=1)
    swept = sweep_stale(storage, but="run-b")
    assert {run_id: set(names) for run_id, names in swept.items()} == {"run-a": set(left)}
    assert all(storage.exists(name) for name in kept + live_left)
    late = write_part(storage, "samples/run-a-late.parquet", pa.Table.from_pylist([{"sample_id": "x"}], SAMPLES))
    with pytest.raises(FencedError):
        zombie.commit([late])


def test_sweep_stale_by_two_runs_at_once(storage):
    _, left = write_run(storage, "run-a", committed=1, lost=8)
    set_heartbeat(storage, replace(own_heartbeat(storage, "run-a"), renewed_at=time.time() - 65))
    with ThreadPoolExecutor(2) as pool:
        swept = list(pool.map(lambda name: sweep_stale(storage, but=name), ("run-b", "run-c")))
    assert {name for found in swept for names in found.values() for name in names} == set(left)
    assert not any(storage.exists(name) for name in left)


def test_uncommitted_files_does_not_take_what_is_committed_while_it_looks(storage, monkeypatch):
    """The log is read after the folder is listed: a part committed in between is not up for removal."""
    committer = Committer(Table(storage, "samples"), "run-a")
    part = write_part(storage, "samples/run-a-0.parquet", pa.Table.from_pylist([{"sample_id": "x"}], SAMPLES))
    files = Storage.files

    def commit_after_listing(self, folder="", recursive=True):
        yield from list(files(self, folder, recursive))
        if folder == "samples":
            committer.commit([part])

    monkeypatch.setattr(Storage, "files", commit_after_listing)
    assert uncommitted_files(storage) == []
