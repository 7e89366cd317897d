from __future__ import annotations

import errno
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from botocore.exceptions import ClientError

from infra.errors import UserError
from infra.storage import Storage, make_folder, reaching


def test_storage_keeps_names_relative_to_its_root(storage):
    storage.write_bytes("media/run/a.tar", b"0123456789")
    storage.write_bytes("dataset.json", b"{}")
    assert set(storage.files()) == {"media/run/a.tar", "dataset.json"}
    assert list(storage.files("media")) == ["media/run/a.tar"]
    assert list(storage.files("media", recursive=False)) == []
    assert list(storage.files("nowhere")) == []
    assert storage.read_bytes("media/run/a.tar", 2, 5) == b"234"
    assert storage.read_bytes("media/run/a.tar", 8, 12) == b"89"
    assert storage.read_bytes("media/run/a.tar", 10, 12) == storage.read_bytes("media/run/a.tar", 99, 100) == b""
    assert storage.sizes(["media/run/a.tar", "dataset.json"]) == [10, 2]
    assert abs(storage.modified("dataset.json") - time.time()) < 60


def test_storage_says_that_a_file_is_missing(storage):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nothing")
    with pytest.raises(FileNotFoundError):
        storage.sizes(["nothing"])
    storage.delete("nothing")
    assert not storage.exists("nothing")


def test_storage_travels_to_another_process(storage):
    storage.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


def test_create_bytes_is_won_by_one_of_many(storage):
    start = threading.Barrier(8)

    def create(at: int) -> bool:
        start.wait()
        return storage.create_bytes("dataset.json", b"%d" % at)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes("dataset.json") == b"%d" % won.index(True)
    assert list(storage.files()) == ["dataset.json"]


@pytest.mark.parametrize("lost", [False, True])
def test_create_bytes_understands_other_stores(s3_endpoint, monkeypatch, lost):
    """A refusal in other words than AWS's; and one that only repeats a request of this call's own, whose answer was lost."""
    storage = Storage(f"s3://bucket/{uuid4().hex}", s3_endpoint, allow_http=True)
    create = storage.fs.pipe_file

    def refuse(path, data, mode):
        if lost:
            create(path, data, mode=mode)
        raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")

    if not lost:
        storage.write_bytes("dataset.json", b"theirs")
    monkeypatch.setattr(storage.fs, "pipe_file", refuse)
    assert storage.create_bytes("dataset.json", b"ours") is lost
    assert storage.read_bytes("dataset.json") == (b"ours" if lost else b"theirs")


def test_create_bytes_works_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    assert storage.create_bytes("dataset.json", b"1")
    assert not storage.create_bytes("dataset.json", b"2")
    assert storage.read_bytes("dataset.json") == b"1"
    assert list(storage.files()) == ["dataset.json"]


def test_writing_piece_by_piece(storage):
    pieces = [b"a" * 10, b"b" * 6_000_000, b"c"]
    with storage.writing("media/a.tar") as file:
        for piece in pieces:
            file.write(piece)
        assert not storage.exists("media/a.tar"), "it is there once it is whole"
    assert storage.read_bytes("media/a.tar") == b"".join(pieces)
    with pytest.raises(KeyboardInterrupt), storage.writing("media/b.tar") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(storage.files()) == ["media/a.tar"]


def test_write_bytes_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    storage = Storage(str(tmp_path))
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes("samples/a.parquet", b"PAR1")
    assert list(storage.files()) == []


@pytest.mark.parametrize(
    ("message", "told"), [(None, "SignatureDoesNotMatch"), ("It differs", "SignatureDoesNotMatch: It differs")]
)
def test_what_a_store_refuses_is_told_with_its_code(message, told):
    """Ceph gives no message."""
    answer = ClientError({"Error": {"Code": "SignatureDoesNotMatch", "Message": message or ""}}, "ListObjectsV2")
    with pytest.raises(UserError, match=rf"\(PermissionError: {told}\); check"), reaching("s3://bucket/x"):
        raise PermissionError(message) from answer


def test_a_folder_that_cannot_be_made_is_told_with_its_option(tmp_path):
    make_folder("--out", tmp_path / "a" / "b")
    make_folder("--out", tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--out: .*/file/c cannot be written \(Not a directory\); choose another"):
        make_folder("--out", tmp_path / "file" / "c")
