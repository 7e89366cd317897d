"""Files on S3 behind a bad network: every operation survives every kind of fault, in one piece and in parts."""

from __future__ import annotations

import random
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import uuid4

import pytest
from s3_proxy import KINDS, ON_CEPH, Faults

from infra import control, s3
from infra.control import Pulse, beating, live_runs
from infra.s3 import PART_BYTES, unfinished_uploads
from infra.storage import Storage
from infra.vacuum import vacuum

DATA = bytes(range(256)) * 40
SMALL_PART = 5 * 2**20
"""The smallest that S3 takes."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_survives_a_fault(kind: str, bad_s3: Storage, faults: Faults) -> None:
    for name in ("a", "b"):
        bad_s3.write_bytes(name, b"old")
    n = 0

    def befall(method: str, path: str) -> None:
        nonlocal n
        n += 1
        faults.once.append((kind, method, path))

    befall("PUT", "/a")
    bad_s3.write_bytes("a", DATA)
    befall("PUT", "/new")
    assert bad_s3.create_bytes("new", DATA)
    befall("PUT", "/new")
    assert not bad_s3.create_bytes("new", b"later")
    befall("GET", "/a")
    assert bad_s3.read_bytes("a") == DATA
    befall("GET", "/a")
    assert bad_s3.read_bytes("a", 10, 20) == DATA[10:20]
    befall("GET", "/a")
    assert bad_s3.read_ranges([("a", 1, 3), ("new", 0, 10)]) == [DATA[1:3], DATA[:10]]
    befall("GET", "/a")
    with bad_s3.reading("a") as file:
        assert file.read() == DATA
    befall("HEAD", "/a")
    assert bad_s3.sizes(["a", "new"]) == [len(DATA), len(DATA)]
    befall("DELETE", "/b")
    bad_s3.delete("b")
    befall("GET", "list-type")
    assert set(bad_s3.files()) == {"a", "new"}
    befall("HEAD", "/b")
    assert not bad_s3.exists("b")
    assert faults.once == []
    assert faults.injected == {kind: n}


def test_many_clients_at_once_on_a_bad_network(bad_s3: Storage, faults: Faults) -> None:
    faults.share = 0.05

    def use(at: int) -> bool:
        data = random.Random(at).randbytes(1000 + at)
        bad_s3.write_bytes(f"media/{at}.tar", data)
        mine = bad_s3.create_bytes(f"once/{at // 2}", b"%d" % at)
        return bad_s3.read_bytes(f"media/{at}.tar") == data and mine == (
            bad_s3.read_bytes(f"once/{at // 2}") == b"%d" % at
        )

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(80)))
    assert len(list(bad_s3.files("media"))) == 80 and len(list(bad_s3.files("once"))) == 40
    assert set(faults.injected) == set(KINDS)
    print(f"{len(faults.seen)} answers, {dict(faults.injected)} in {time.monotonic() - began:.1f} s")


def test_storage_that_never_answers_is_an_oserror(
    bad_s3: Storage, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that go on without it, such as the heartbeat, catch that and nothing else."""
    monkeypatch.setattr(s3, "ATTEMPTS", 3)
    faults.share = 1.0
    for kind in ("reset", "error", "slow_down"):
        faults.kinds = (kind,)
        before = faults.injected[kind]
        with pytest.raises(OSError, match=r"injected|no whole answer in 3 attempts"):
            bad_s3.write_bytes("a", b"1")
        assert faults.injected[kind] >= before + 3


def test_a_heartbeat_outlives_an_outage(bad_s3: Storage, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setattr(control, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(control, "RENEW_SECONDS", 0.0)
    with beating(Pulse(bad_s3, "run-a"), "sampling", dict):
        faults.share, faults.kinds = 1.0, ("reset",)
        while faults.injected["reset"] < 8:
            time.sleep(0.05)
        faults.share, back = 0.0, time.time()
        for _ in range(100):
            if live_runs(bad_s3)[0].renewed_at > back:
                return
            time.sleep(0.1)
    raise AssertionError("the heartbeat did not come back")


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_in_parts_survives_a_fault(
    kind: str, bad_s3: Storage, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", SMALL_PART)
    storage = replace(bad_s3, timeout=2)
    faults.stall = 3
    data = random.Random(1).randbytes(2 * SMALL_PART + 1)
    for name, way in (("streamed.tar", _stream), ("whole.tar", Storage.write_bytes)):
        faults.once += [
            (kind, "POST", f"/{name}?uploads"),
            (kind, "PUT", f"/{name}?partNumber=2"),
            (kind, "POST", f"/{name}?uploadId"),
        ]
        way(storage, name, data)
        assert faults.once == []
        faults.once += [(kind, "GET", f"/{name}")]
        assert storage.read_bytes(name) == data
    assert sum("uploads" not in seen.path and seen.method == "PUT" for seen in faults.seen) >= 6
    # One that was begun, and whose answer was lost, can only be found by listing.
    begun = len(list(unfinished_uploads(storage)))
    assert begun >= (kind == "lost")
    if ON_CEPH:  # moto's uploads all began in 2010
        assert vacuum(storage) == []
    assert sum("unfinished" in name for name in vacuum(storage, older_than=0)) == begun
    assert list(unfinished_uploads(storage)) == []


@pytest.mark.parametrize("way", ["part", "end", "caller"])
def test_an_upload_that_fails_leaves_nothing(
    way: str, bad_s3: Storage, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setattr(s3, "PART_BYTES", SMALL_PART)
    storage = replace(bad_s3, timeout=5)
    path = {"part": ("PUT", "partNumber=2"), "end": ("POST", "uploadId"), "caller": ("", "")}[way]
    data = bytes(2 * SMALL_PART + 1)
    for write in (_stream, Storage.write_bytes):
        if way == "caller":
            with pytest.raises(KeyboardInterrupt), storage.writing("a.tar") as file:
                file.write(data)
                raise KeyboardInterrupt
        else:
            faults.once += [("error", *path)] * 2
            with pytest.raises(OSError, match="injected"):
                write(storage, "a.tar", data)
            assert faults.once == []
        assert list(storage.files()) == []
        assert list(unfinished_uploads(storage)) == []


def test_a_large_file_is_never_in_memory_as_a_whole(s3_endpoint: str) -> None:
    storage = Storage(f"s3://bucket/{uuid4().hex}", s3_endpoint, allow_http=True)
    piece = bytes(2**20)
    storage.write_bytes("warm", piece)
    tracemalloc.start()
    try:
        with storage.writing("a.tar") as file:
            for _ in range(8 * PART_BYTES // len(piece)):
                file.write(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert storage.size("a.tar") == 8 * PART_BYTES
    assert peak < 4 * PART_BYTES


def test_create_bytes_behind_a_bad_network_is_won_by_one(bad_s3: Storage, faults: Faults) -> None:
    faults.share = 0.05
    start = threading.Barrier(8)

    def create(at: int) -> list[bool]:
        start.wait()
        return [bad_s3.create_bytes(f"{name}", b"%d" % at) for name in range(5)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    for name in range(5):
        (winner,) = (at for at in range(8) if won[at][name])
        assert bad_s3.read_bytes(str(name)) == b"%d" % winner


def _stream(storage: Storage, name: str, data: bytes) -> None:
    with storage.writing(name) as file:
        for at in range(0, len(data), 2**20):
            file.write(data[at : at + 2**20])
