"""The tables on S3 behind a bad network: no row is lost or doubled, whoever else is writing."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from s3_proxy import KINDS, Faults

from infra.commit import Committer, FencedError, Part, fence, write_part
from infra.control import uncommitted_files
from infra.schema import FAILURES
from infra.storage import Storage
from infra.tables import Table

REPO = Path(__file__).parents[2]


def part_of(storage: Storage, run_id: str, number: int, ids: range) -> Part:
    rows = [{"sample_id": f"{at:032x}", "attempt": 1, "run_id": run_id, "error_type": "test"} for at in ids]
    return write_part(storage, f"failures/{run_id}-{number}.parquet", pa.Table.from_pylist(rows, FAILURES))


def owners(storage: Storage) -> Counter[str]:
    """How many rows each run has; a key that stands twice fails the test."""
    found = Table(storage, "failures").read(["sample_id", "run_id"]).to_pylist()
    assert max(Counter(row["sample_id"] for row in found).values(), default=1) == 1
    return Counter(row["run_id"] for row in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_survives_a_fault(kind: str, bad_s3: Storage, faults: Faults) -> None:
    """Of the request that is the commit, as it lands and as it does not, of listing the log and of reading it."""
    befallen = [
        ("PUT", "_delta_log/00000000000000000000.json"),
        ("PUT", "_delta_log/00000000000000000001.json"),
        ("GET", "list-type"),
        ("GET", "_delta_log/00000000000000000001.json"),
        ("PUT", "_delta_log/00000000000000000003.json"),
    ]
    faults.once += [(kind, *which) for which in befallen[:2]]
    committer = Committer(Table(bad_s3, "failures"), "run-a")
    assert committer.commit([part_of(bad_s3, "run-a", 0, range(3))]).rows == 3
    faults.once += [(kind, *which) for which in befallen[2:]]
    other = Committer(Table(bad_s3, "failures"), "run-b")
    assert other.commit([part_of(bad_s3, "run-b", 0, range(3, 6))]).rows == 3
    done = committer.commit([part_of(bad_s3, "run-a", 1, range(4, 9))])
    assert (done.rows, done.dropped) == (3, 2)
    assert owners(bad_s3) == {"run-a": 6, "run-b": 3}
    assert faults.once == []
    again = committer.commit([part_of(bad_s3, "run-a", 1, range(4, 9))])
    assert (again.rows, again.dropped) == (3, 2)
    assert Table(bad_s3, "failures").handle().version() == 3


@pytest.mark.parametrize("kind", ["reset", "lost"])
def test_a_fence_survives_a_fault(kind: str, bad_s3: Storage, faults: Faults) -> None:
    zombie = Committer(Table(bad_s3, "failures"), "run-a")
    other = Committer(Table(bad_s3, "failures"), "run-b")
    faults.once.append((kind, "PUT", "_delta_log"))
    fence(Table(bad_s3, "failures"), "run-a")
    with pytest.raises(FencedError):
        zombie.commit([part_of(bad_s3, "run-a", 0, range(4))])
    assert other.commit([part_of(bad_s3, "run-b", 0, range(4))]).rows == 4


def test_a_commit_that_nobody_answers_is_given_up_and_can_be_made_again(bad_s3: Storage, faults: Faults) -> None:
    committer = Committer(Table(bad_s3, "failures"), "run-a")
    parts = [part_of(bad_s3, "run-a", 0, range(4))]
    faults.once += [("reset", "PUT", "_delta_log")] * 20
    with pytest.raises(OSError, match="S3"):
        committer.commit(parts)
    assert 0 < len(faults.once) < 20
    faults.once.clear()
    assert owners(bad_s3) == {}
    assert committer.commit(parts).rows == 4


def drive(storage: Storage, run_id: str, first: int) -> int:
    """48 keys in eight commits, beginning with the `first`; how many rows this driver was told are its own."""
    committer = Committer(Table(storage, "failures"), run_id)
    print("open", flush=True)
    sys.stdin.readline()
    order = [*range(first, 8), *range(first)]
    return sum(
        committer.commit([part_of(storage, run_id, at, range(6 * which, 6 * which + 6))]).rows
        for at, which in enumerate(order)
    )


def test_two_drivers_on_a_bad_network_commit_each_key_once(
    bad_s3: Storage, faults: Faults, capsys: pytest.CaptureFixture[str]
) -> None:
    faults.share = 0.05
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_s3_tables import Storage, drive\n"
        "storage = Storage(sys.argv[2], sys.argv[3], allow_http=True, timeout=1)\n"
        "print(drive(storage, sys.argv[4], int(sys.argv[5])))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), bad_s3.root, str(bad_s3.endpoint_url)]
    began = time.monotonic()
    drivers = [
        subprocess.Popen([*command, f"run-{at}", str(3 * at)], stdin=-1, stdout=-1, text=True, cwd=REPO)
        for at in range(2)
    ]
    for driver in drivers:
        assert driver.stdout.readline() == "open\n"
    for driver in drivers:
        driver.stdin.write("go\n")
        driver.stdin.flush()
    told = [int(driver.communicate(timeout=300)[0]) for driver in drivers]
    seconds, injected, answered = time.monotonic() - began, dict(faults.injected), len(faults.seen)
    faults.share = 0.0
    said = owners(bad_s3)
    assert [said[f"run-{at}"] for at in range(2)] == told
    assert sum(told) == 48
    live = Table(bad_s3, "failures").files()
    assert len(live) == len(set(live)) and not set(live) & set(uncommitted_files(bad_s3))
    assert sum(injected.values()) >= 10
    with capsys.disabled():
        print(f"\ntwo drivers: {answered} answers in {seconds:.1f} s, {told} rows, injected {injected}")


def test_a_table_is_looked_at_again_by_asking_for_what_is_new(bad_s3: Storage, faults: Faults) -> None:
    committer = Committer(Table(bad_s3, "failures"), "run-a")
    for number in range(4):
        committer.commit([part_of(bad_s3, "run-a", number, range(9 * number, 9 * number + 9))])
    looking = pickle.loads(pickle.dumps(bad_s3))
    table = Table(looking, "failures")
    assert table.read().num_rows == 36
    committer.commit([part_of(bad_s3, "run-a", 4, range(36, 40))])
    faults.seen.clear()
    assert table.read().num_rows == table.dataset().count_rows() == 40
    # A slow answer is asked for again: what was asked for tells, not how often.
    asked = {Path(seen.key).name for seen in faults.seen if Path(seen.key).suffix in (".parquet", ".json")}
    assert asked == {"run-a-4.parquet", f"{5:020d}.json"}, "the new part and the commit that names it"
    there = pickle.loads(pickle.dumps(looking))
    assert there == looking and vars(there).keys().isdisjoint({"handles", "parts", "fs"})


def test_parts_are_read_right_whatever_their_size_and_how_many_are_kept(
    bad_s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.s3.SMALL_BYTES", 4096)
    monkeypatch.setattr("infra.s3.KEPT_BYTES", 8192)
    committer = Committer(Table(bad_s3, "failures"), "run-a")
    parts = [
        part_of(bad_s3, "run-a", number, range(10**4 * number, 10**4 * number + 40**number)) for number in range(3)
    ]
    parts += [part_of(bad_s3, "run-a", number, range(10**4 * number, 10**4 * number + 5)) for number in range(3, 6)]
    assert min(part.nbytes for part in parts) < 4096 < max(part.nbytes for part in parts)
    committer.commit(parts)
    for _ in range(2):
        assert owners(bad_s3) == {"run-a": sum(part.rows for part in parts)}
    assert sum(map(len, bad_s3.parts.handler._kept.values())) <= 8192
    with pytest.raises(FileNotFoundError):
        Table(bad_s3, "failures").dataset(["failures/none.parquet"]).to_table()
