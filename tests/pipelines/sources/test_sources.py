"""What each kind of source lists, in which order, and what a shard and a limit leave of it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import UserError
from infra.opening import Member, member_of, opened
from pipelines.sources import list_items
from pipelines.sources.item import Item
from pipelines.spec import parse_spec


def _listed(*sources: dict[str, Any], **sections: Any) -> list[Item]:
    return list(list_items(parse_spec({"recipe": "curate", "sources": list(sources), **sections})))


def _tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.mp4", "a.MP4", "a.txt", "notes.txt", ".hidden.mp4", "in/c.webm", "in/c.json", "in/deep/d.png"):
        path = tmp_path / "media" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "media" / "loop").symlink_to(tmp_path / "media")
    return tmp_path / "media"


def test_a_folder_is_listed_by_name_with_what_stands_beside_a_file(folder: Path) -> None:
    items = _listed({"path": str(folder), "tags": ["x"], "licence": "CC0", "caption": "text"})
    names = [Path(item.uri).relative_to(folder).as_posix() for item in items]
    assert names == ["a.MP4", "b.mp4", "in/c.webm", "in/deep/d.png"]
    assert [Path(uri).name for item in items for uri in item.sidecars] == ["a.txt", "c.json"]
    assert {(item.tags, item.licence, item.caption_key) for item in items} == {(("x",), "CC0", "text")}


def test_shards_are_disjoint_and_whole_and_the_limit_counts_after_them(folder: Path) -> None:
    every = {item.uri for item in _listed({"path": str(folder)})}
    parts = [
        {item.uri for item in _listed({"path": str(folder), "shard": {"index": at, "count": 3}})} for at in range(3)
    ]
    assert sum(map(len, parts)) == len(every)
    assert set().union(*parts) == every
    for at, part in enumerate(parts):
        one = _listed({"path": str(folder), "shard": {"index": at, "count": 3}, "limit": 1})
        assert {item.uri for item in one} <= part
        assert len(one) == min(1, len(part))


def test_a_tar_gives_members_by_their_place_and_groups_those_of_one_key(tmp_path: Path) -> None:
    shard = tmp_path / "0000.tar"
    _tar(shard, [("x/1.mp4", b"one"), ("x/1.txt", b"says one"), ("x/2.json", b"{}"), ("x/2.mp4", b"two"), ("3", b"-")])
    items = _listed({"path": str(tmp_path / "*.tar")})
    members = [member_of(item.uri) for item in items]
    assert [member and (member.tar, member.name) for member in members] == [
        (str(shard), "x/1.mp4"),
        (str(shard), "x/2.mp4"),
    ]
    for item, data in zip(items, (b"one", b"two"), strict=True):
        with opened(item.uri) as file:
            assert (file.seek(0, 2), file.seek(0), file.read()) == (3, 0, data)
    with opened(items[0].sidecars[0]) as file:
        assert file.read() == b"says one"


@pytest.mark.parametrize(
    "name", ["../../escape.mp4", "/etc/passwd.mp4", "a.tar#b@1+2.mp4", "new\nline.mp4", "x@9+9.mp4"]
)
def test_a_member_s_name_is_said_and_never_a_path(tmp_path: Path, name: str) -> None:
    _tar(tmp_path / "s.tar", [(name, b"data")])
    (item,) = _listed({"path": str(tmp_path / "s.tar")})
    assert member_of(item.uri) == Member(str(tmp_path / "s.tar"), name, *_place(tmp_path / "s.tar"))
    with opened(item.uri) as file:
        assert file.read() == b"data"


def _place(shard: Path) -> tuple[int, int]:
    with tarfile.open(shard) as tar:
        (info,) = tar.getmembers()
    return info.offset_data, info.size


def test_a_tar_that_is_cut_off_gives_what_it_has_and_then_an_error(tmp_path: Path) -> None:
    _tar(tmp_path / "s.tar", [("1.mp4", b"x" * 2000), ("2.mp4", b"y" * 2000), ("3.mp4", b"z")])
    data = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(data[:512] + data[512:2560] + b"\xff" * 512 + data[3072:])
    items = _listed({"path": str(tmp_path / "s.tar")})
    assert [bool(item.error) for item in items] == [False, True]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_a_table_s_rows_are_items_and_other_columns_pass_through(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clips.{suffix}"
    rows = [
        {"link": "https://host/a.mp4", "text": "a cat", "score": "5"},
        {"link": "near/b.mp4", "text": "", "score": "6"},
    ]
    if suffix == "csv":
        path.write_text("link,text,score\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = _listed({"path": str(path), "column": "link", "caption": "text"})
    assert (first.uri, first.caption, first.extra) == ("https://host/a.mp4", "a cat", {"score": "5"})
    assert (second.uri, second.caption) == (str(tmp_path / "near" / "b.mp4"), "")


def test_a_uri_outside_of_the_policy_is_not_opened_and_loses_its_secrets(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("url\nhttps://good/a.mp4\nhttps://me:secret@bad/b.mp4\nhttps://bad/c.mp4\n")
    items = _listed({"path": str(tmp_path / "t.csv")}, policy={"endpoints": ["good"]})
    assert [bool(item.error) for item in items] == [False, True, True]
    assert "secret" not in items[1].uri + items[1].error


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "nowhere"}, "sources.0.path: .*nowhere does not exist"),
        ({"path": "nowhere.tar"}, "sources.0.path: .*nowhere.tar does not exist"),
        ({"path": "some.tar.gz"}, "sources: .*is a packed tar, whose members have no places; unpack it"),
        ({"path": "out/x", "kind": "release"}, "sources.0.path: expected DATASET/releases/NAME"),
    ],
)
def test_a_source_that_cannot_be_listed_is_one_line(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        _listed({**source, "path": str(tmp_path / source["path"])})
