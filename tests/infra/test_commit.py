from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from infra import commit as commits
from infra.commit import Committer, FencedError, Part, fence, write_part
from infra.schema import FAILURES
from infra.storage import Storage
from infra.tables import Table

REPO = Path(__file__).parents[2]


def rows(ids: range | list[int], run_id: str) -> pa.Table:
    return pa.Table.from_pylist(
        [{"sample_id": f"{at:032x}", "attempt": 1, "run_id": run_id, "error_type": "test"} for at in ids], FAILURES
    )


def part(storage: Storage, run_id: str, number: int, ids: range | list[int]) -> Part:
    return write_part(storage, f"failures/{run_id}-{number}.parquet", rows(ids, run_id))


def owners(storage: Storage) -> dict[str, str]:
    """sample_id -> the run whose row it is; each must be there once."""
    found = Table(storage, "failures").read(["sample_id", "run_id"]).to_pylist()
    assert max(Counter(row["sample_id"] for row in found).values(), default=1) == 1
    return {row["sample_id"]: row["run_id"] for row in found}


def commit_all(storage: Storage, run_id: str, first: int, opened: Callable[[], object] = lambda: None) -> int:
    """All of 25 ids in five commits, beginning with the `first`; the rows that this run was told are its own."""
    committer = Committer(Table(storage, "failures"), run_id)
    opened()
    chunks = [range(5 * at, 5 * at + 5) for at in (*range(first, 5), *range(first))]
    return sum(committer.commit([part(storage, run_id, at, ids)]).rows for at, ids in enumerate(chunks))


def commit_one(storage: Storage, run_id: str, ids: range | list[int]) -> None:
    Committer(Table(storage, "failures"), run_id).commit([part(storage, run_id, 0, ids)])


def test_commit_makes_rows_and_says_how_many(storage):
    committer = Committer(Table(storage, "failures"), "run-a")
    done = committer.commit([part(storage, "run-a", 0, range(3)), part(storage, "run-a", 1, range(3, 8))])
    assert (done.rows, done.dropped) == (8, 0)
    assert set(owners(storage).values()) == {"run-a"}
    assert len(owners(storage)) == 8


def test_commit_keeps_the_first_of_a_key(storage):
    first = Committer(Table(storage, "failures"), "run-a")
    second = Committer(Table(storage, "failures"), "run-b")
    assert second.commit([part(storage, "run-b", 0, range(2, 6))]).rows == 4
    done = first.commit([part(storage, "run-a", 0, range(4)), part(storage, "run-a", 1, range(4, 6))])
    assert (done.rows, done.dropped) == (2, 4)
    said = owners(storage)
    assert [said[f"{at:032x}"] for at in range(6)] == ["run-a"] * 2 + ["run-b"] * 4


def test_commit_again_does_nothing(storage):
    committer = Committer(Table(storage, "failures"), "run-a")
    parts = [part(storage, "run-a", 0, range(4))]
    committer.commit(parts)
    version = Table(storage, "failures").handle().version()
    again = committer.commit(parts)
    assert (again.rows, again.dropped) == (4, 0)
    assert Table(storage, "failures").handle().version() == version


def test_commit_again_of_a_part_that_was_rewritten_does_nothing(storage):
    """The run's own list still has the part as it was before its taken rows were left out."""
    committer = Committer(Table(storage, "failures"), "run-a")
    commit_one(storage, "run-b", range(2))
    parts = [part(storage, "run-a", 0, range(4))]
    assert committer.commit(parts).rows == 2
    commit_one(storage, "run-c", [9])
    again = committer.commit(parts)
    assert (again.rows, again.dropped) == (2, 2)
    assert len(owners(storage)) == 5


@pytest.mark.parametrize("rewritten", [False, True])
def test_commit_recognises_its_own_after_a_lost_answer(storage, monkeypatch, rewritten):
    committer = Committer(Table(storage, "failures"), "run-a")
    if rewritten:
        commit_one(storage, "run-b", range(2))
    append = commits._append

    def lose_answer(*arguments):
        append(*arguments)
        raise OSError("connection reset by peer")

    monkeypatch.setattr(commits, "_append", lose_answer)
    done = committer.commit([part(storage, "run-a", 0, range(4))])
    assert done.rows == (2 if rewritten else 4)
    assert len(owners(storage)) == 4


def test_commit_that_lands_after_its_error_is_not_made_twice(storage, monkeypatch):
    """The request is still under way when the client gives up, and lands before the caller tries again."""
    committer = Committer(Table(storage, "failures"), "run-a")
    commit_one(storage, "run-b", range(2))
    append, late = commits._append, []

    def fail(*arguments):
        late.append(arguments)
        raise OSError("timed out")

    monkeypatch.setattr(commits, "_append", fail)
    parts = [part(storage, "run-a", 0, range(6))]
    with pytest.raises(OSError, match="timed out"):
        committer.commit(parts)
    monkeypatch.setattr(commits, "_append", append)
    append(Table(storage, "failures").handle(), *late[0][1:])
    assert committer.commit(parts).rows == 4
    assert len(owners(storage)) == 6


def test_commit_that_failed_can_be_made_again(storage, monkeypatch):
    committer = Committer(Table(storage, "failures"), "run-a")
    parts = [part(storage, "run-a", 0, range(4))]
    with monkeypatch.context() as broken:
        broken.setattr(commits, "_append", lambda *_: (_ for _ in ()).throw(OSError("storage is down")))
        with pytest.raises(OSError, match="storage is down"):
            committer.commit(parts)
    assert owners(storage) == {}
    assert committer.commit(parts).rows == 4


def test_commit_refuses_a_part_that_is_not_there(storage):
    committer = Committer(Table(storage, "failures"), "run-a")
    gone = part(storage, "run-a", 0, range(4))
    storage.delete(gone.path)
    with pytest.raises(FileNotFoundError):
        committer.commit([gone])
    short = part(storage, "run-a", 1, range(4))
    with pytest.raises(FileNotFoundError, match=r"expected \d+ bytes"):
        committer.commit([Part(short.path, short.nbytes + 1, short.rows)])
    assert owners(storage) == {}


def test_commit_of_a_fenced_run_is_refused(storage):
    zombie = Committer(Table(storage, "failures"), "run-a")
    other = Committer(Table(storage, "failures"), "run-b")
    fence(Table(storage, "failures"), "run-a")
    with pytest.raises(FencedError, match="run-a"):
        zombie.commit([part(storage, "run-a", 0, range(4))])
    assert other.commit([part(storage, "run-b", 0, range(4))]).rows == 4


def test_fence_goes_between_a_look_and_its_commit(storage, monkeypatch):
    """The zombie has looked and is about to commit: the compare-and-swap must fail, and the fence be seen."""
    zombie = Committer(Table(storage, "failures"), "run-a")
    append = commits._append

    def fence_first(*arguments):
        monkeypatch.setattr(commits, "_append", append)
        fence(Table(storage, "failures"), "run-a")
        append(*arguments)

    monkeypatch.setattr(commits, "_append", fence_first)
    with pytest.raises(FencedError):
        zombie.commit([part(storage, "run-a", 0, range(4))])
    assert owners(storage) == {}


def test_commits_of_many_threads_keep_each_key_once(storage):
    start = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda at: commit_all(storage, f"run-{at}", at, start.wait), range(4)))
    said = Counter(owners(storage).values())
    assert sum(said.values()) == 25
    assert [said[f"run-{at}"] for at in range(4)] == told


def test_commits_of_processes_keep_each_key_once(storage):
    """They create the table at the same time, too."""
    code = (
        "import importlib.util, sys\n"
        f"found = importlib.util.spec_from_file_location('helper', {str(Path(__file__))!r})\n"
        "helper = importlib.util.module_from_spec(found); found.loader.exec_module(helper)\n"
        "from infra.storage import Storage\n"
        "root, endpoint, run_id, first = sys.argv[1:]\n"
        "storage = Storage(root, endpoint or None, allow_http=True)\n"
        "def opened():\n    print('open', flush=True); sys.stdin.readline()\n"
        "print(helper.commit_all(storage, run_id, int(first), opened))\n"
    )
    command = [sys.executable, "-c", code, storage.root, storage.endpoint_url or ""]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPO}
    runs = [subprocess.Popen([*command, f"run-{at}", str(at)], **pipes) for at in range(3)]
    for run in runs:
        assert run.stdout.readline() == "open\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    told = [int(run.communicate(timeout=120)[0]) for run in runs]
    said = Counter(owners(storage).values())
    assert sum(said.values()) == 25
    assert [said[f"run-{at}"] for at in range(3)] == told


def test_commits_beyond_a_checkpoint_read_the_same(tmp_path):
    """Delta writes a checkpoint each 100 commits; committers read the log itself."""
    storage = Storage(str(tmp_path))
    early = Committer(Table(storage, "failures"), "run-a")
    late = Committer(Table(storage, "failures"), "run-b")
    for at in range(105):
        late.commit([part(storage, "run-b", at, [at])])
    assert early.commit([part(storage, "run-a", 0, range(110))]).rows == 5
    assert len(owners(storage)) == 110
    assert all(name.endswith(".parquet") and name.count("/") == 1 for name in Table(storage, "failures").files())


def test_rows_of_a_part_from_an_older_version_read_with_nulls(tmp_path):
    """A column that a later version adds is null in what was written before."""
    storage = Storage(str(tmp_path))
    committer = Committer(Table(storage, "failures"), "run-a")
    old = rows(range(2), "run-a").drop_columns(["node"])
    committer.commit([write_part(storage, "failures/run-a-0.parquet", old)])
    assert Table(storage, "failures").read()["node"].to_pylist() == [None, None]
