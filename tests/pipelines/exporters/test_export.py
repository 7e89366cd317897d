"""Exports: killed anywhere, gone on with, added to, refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli import app
from infra.errors import UserError
from infra.storage import Storage
from pipelines.export import export
from pipelines.exporters import FORMATS, Format, exporter_of, samples_in
from pipelines.release import release
from pipelines.samples import StoredSample, read_samples
from tests.pipelines.exporters.drawn import Made, files, stored_as


class Killed(Exception):
    """In the place of SIGKILL: nobody catches it."""


def ids(folder: Path) -> list[str]:
    names = sorted(folder.rglob("*.parquet"), key=lambda path: int(path.stem.rsplit("_", 1)[-1]))
    return [row for name in names for row in pq.read_table(name, columns=["id"])["id"].to_pylist()]


def of_release(storage: Storage, name: str, since: tuple[str, ...] = ()) -> list[str]:
    return [str(sample.row["sample_id"]) for sample in stored_as(Made)(storage, name, since=since)]


# ---- killed and gone on with


def killing(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    """Raise at the `at`-th rename or read of a tensor, before it or after it."""
    count = -1

    def counted(do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                raise Killed
            done = do(*args)
            if count == at:
                raise Killed
            return done

        return call

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Made, "latents", counted(Made.latents))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_export_killed_anywhere_ends_with_the_bytes_of_one_that_never_was(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".parquet")]) == 4
    killed = 0
    while True:
        out = tmp_path / f"killed-{killed}"
        with monkeypatch.context() as patch:
            killing(patch, killed, after)
            try:
                export(shapes, "v1", "fastvideo-t2v", str(out))
                break
            except Killed:
                killed += 1
        export(shapes, "v1", "fastvideo-t2v", str(out))
        assert files(out) == whole
    assert killed == 7 + 1 + 4 + 6, "7 samples, one read for the size of a chunk, 4 files, and 6 times what is done"


def test_an_export_killed_again_and_again_comes_to_its_end(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in range(20):
        try:
            with monkeypatch.context() as patch:
                killing(patch, 5, after=bool(attempt % 2))
                export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "killed"))
            break
        except Killed:
            continue
    assert 1 < attempt < 19
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "whole"))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_is_done_is_not_read_again(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    before = files(tmp_path / "out")

    def read(sample: StoredSample) -> np.ndarray:
        raise AssertionError("a finished export reads no tensor")

    monkeypatch.setattr(Made, "latents", read)
    done = export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    assert (done.samples, done.in_folder, done.nbytes) == (7, 7, sum(map(len, before.values())))
    assert files(tmp_path / "out") == before


def test_progress_says_what_is_written_of_how_many(shapes: Storage, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export(shapes, "v1", "fastvideo-text", str(tmp_path / "out"), progress=lambda *said: seen.append(said))
    assert seen == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]


def test_the_command_says_what_was_written(shapes: Storage, tmp_path: Path) -> None:
    command = ["export", shapes.root, "--release", "v1", "--to", "fastvideo-text", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{tmp_path}/out: fastvideo-text, 7 samples of v1; ")
    said = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (said["dataset"], said["samples"], said["since"]) == ("shapes", 7, None)
    assert said["nbytes"] == sum(map(len, files(tmp_path / "out").values()))


# ---- added to


def test_a_later_release_is_added_in_new_files(shapes: Storage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(shapes, "v1", "fastvideo-t2v", str(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    done = export(shapes, "v2", "fastvideo-t2v", str(out), since="v1")
    assert (done.samples, done.in_folder, done.left) == (4, 11, 1)
    assert "1 samples that were exported before are no longer in v2" in str(done)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert ids(out) == of_release(shapes, "v1") + of_release(shapes, "v2", since=("v1",))
    assert sorted(path.name for path in out.rglob("*.parquet")) == [f"data_chunk_{n}.parquet" for n in range(6)]
    assert export(shapes, "v2", "fastvideo-t2v", str(out), since="v1") == done


@pytest.mark.parametrize("to", ["fastvideo-t2v", "causvid-lmdb", "webdataset", "hf"])
def test_a_sample_that_was_withdrawn_and_restored_comes_once(paths: Storage, tmp_path: Path, to: str) -> None:
    storage, out = Storage(str(shutil.copytree(paths.root, tmp_path / "dataset"))), str(tmp_path / "out")
    gone = next(read_samples(storage, "v1")).row["sample_id"]
    for name, where in (("without", f"verdict = 'accepted' and sample_id != '{gone}'"), ("again", None)):
        release(storage, name, where)
    whole = export(storage, "v1", to, out)
    fewer = export(storage, "without", to, out, since="v1")
    assert (fewer.samples, fewer.in_folder, fewer.left) == (0, whole.samples, 1)
    again = export(storage, "again", to, out, since="without")
    assert (again.samples, again.in_folder, again.left) == (0, whole.samples, 0)
    alone = [
        export(storage, "without", to, f"{out}-alone"),
        export(storage, "again", to, f"{out}-alone", since="without"),
    ]
    assert [(each.samples, each.left) for each in alone] == [(whole.samples - 1, 0), (1, 0)]
    nothing = export(storage, "without", to, f"{out}-of-nothing", since="v1")
    assert (nothing.samples, nothing.in_folder, nothing.left) == (0, 0, 1)


def test_an_addition_may_be_killed_too(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "killed"):
        export(shapes, "v1", "fastvideo-t2v", str(tmp_path / name))
    export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "whole"), since="v1")
    with monkeypatch.context() as patch:
        killing(patch, 4, after=True)
        with pytest.raises(Killed):
            export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "killed"), since="v1")
    export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "killed"), since="v1")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_is_new_goes_into_a_folder_of_its_own(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = export(shapes, "v2", "fastvideo-text")
    added = export(shapes, "v2", "fastvideo-text", since="v1")
    assert (whole.out, whole.samples) == ("out/export/shapes-v2-fastvideo-text", 10)
    assert (added.out, added.samples) == ("out/export/shapes-v2-fastvideo-text-since-v1", 4)
    assert ids(Path(added.out)) == of_release(shapes, "v2", since=("v1",))


def test_a_cached_list_of_files_does_not_hide_new_ones(shapes: Storage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(shapes, "v1", "fastvideo-t2v", str(out))
    caches = [
        out / "map_style_cache" / "file_info.pkl",
        out / "combined_parquet_dataset" / "map_style_cache" / "file_info.pkl",
        out / "combined_parquet_dataset" / "sharding_info_1_sp_groups_1_workers" / "shard_parquet_files.pkl",
    ]
    for cache in caches:
        cache.parent.mkdir()
        cache.write_bytes(b"of the loader")
    export(shapes, "v1", "fastvideo-t2v", str(out))
    assert all(cache.exists() for cache in caches)
    export(shapes, "v2", "fastvideo-t2v", str(out), since="v1")
    assert not any(cache.exists() for cache in caches)


# ---- refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"release": "v2"}, r"holds v1 of shapes; add to it with --since v1"),
        (
            {"to": "fastvideo-text"},
            r"holds shapes as fastvideo-t2v, not shapes as fastvideo-text; choose another folder",
        ),
        ({"to": "lerobot"}, r"--to: there is no format 'lerobot'; there are: fastvideo-t2v, "),
        ({"release": "v9"}, r"has no such release; there are: v1, v2"),
        ({"release": "v2", "since": "v9"}, r"has no such release; there are: v1, v2"),
        ({"since": "v1"}, r"--since: v1 is the release that is exported"),
        ({"out": "s3://bucket/x"}, r"--out: expected a folder of this machine, found s3://bucket/x"),
    ],
)
def test_another_export_is_refused(shapes: Storage, tmp_path: Path, arguments: dict[str, str], said: str) -> None:
    first: dict[str, str] = {"release": "v1", "to": "fastvideo-t2v", "out": str(tmp_path / "out")}
    export(shapes, **first)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=said):
        export(shapes, **first | arguments)
    assert files(tmp_path / "out") == before


def test_a_folder_of_something_else_is_refused(shapes: Storage, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and is no export"):
        export(shapes, "v1", "fastvideo-t2v", str(tmp_path))
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "notes.txt"))
    (tmp_path / "out").mkdir()
    for text in ("{", "[]", '{"version": 9}', '{"version": 1, "parts": [{}]}'):
        (tmp_path / "out" / "export.json").write_text(text)
        with pytest.raises(UserError, match="is not of this version of ditmill"):
            export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))


def test_a_release_is_known_by_more_than_its_name(
    shapes: Storage, dataset: Callable[..., Storage], tmp_path: Path
) -> None:
    other = dataset(accepted=9, rejected=0, failures=0)
    other.write_bytes("dataset.json", shapes.read_bytes("dataset.json"))
    release(other, "v1")
    release(other, "v2", "sample_id <> ''")
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    for arguments in ({"release": "v1"}, {"release": "v2", "since": "v1"}):
        with pytest.raises(UserError, match="holds v1 of shapes; add to it with --since v1 of the same dataset"):
            export(other, to="fastvideo-t2v", out=str(tmp_path / "out"), **arguments)


def test_half_an_export_is_not_added_to(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killing(patch, 6, after=False)
        with pytest.raises(Killed):
            export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    with pytest.raises(UserError, match="not all of it; export v1 to its end"):
        export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "out"), since="v1")


def test_a_folder_has_one_writer_at_a_time(shapes: Storage, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another export is writing to"):
            export(shapes, "v1", "fastvideo-t2v", str(tmp_path))
    finally:
        os.close(handle)


def test_every_format_has_its_exporter_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FORMATS:
        assert all(callable(getattr(exporter_of(name), call)) for call in ("check", "chunk_samples", "write", "finish"))
    needy = Format("", "fastvideo:TextOnly", ("no_such_package",))
    monkeypatch.setitem(FORMATS, "needy", needy)  # type: ignore[misc]
    with pytest.raises(UserError, match="--to: needy needs no_such_package; pip install no_such_package"):
        exporter_of("needy")


def test_chunks_hold_a_sample_at_least() -> None:
    assert [samples_in(100, each) for each in (1000, 100, 30, 0)] == [1, 1, 3, 100]
    assert samples_in(10**9, 1) == 1000
