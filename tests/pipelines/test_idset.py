from __future__ import annotations

import secrets

import pyarrow as pa
import pytest

from pipelines.idset import IdSet


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_idset_contains_exactly_what_it_was_given(count: int) -> None:
    ids = [secrets.token_hex(16) for _ in range(count)]
    others = [secrets.token_hex(16) for _ in range(50)]
    column = pa.array(ids, pa.string())
    found = IdSet([column[: count // 2], column[count // 2 :]])
    assert len(found) == count
    assert found.contains(ids).all()
    assert not found.contains(others).any()


def test_idset_tells_ids_apart_that_end_in_zero_bytes() -> None:
    found = IdSet([pa.array(["ab" + "00" * 15])])
    assert found.contains(["ab" + "00" * 15, "ab" + "00" * 14 + "01", "ac" + "00" * 15]).tolist() == [
        True,
        False,
        False,
    ]


def test_idset_collapses_repeats() -> None:
    one = secrets.token_hex(16)
    assert len(IdSet([pa.array([one, one]), pa.array([one])])) == 1


def test_idset_tells_ids_apart_that_share_a_first_half() -> None:
    ids = [f"{first:016x}{second:016x}" for first in (0, 1, 2**64 - 1) for second in (0, 5, 2**64 - 1)]
    found = IdSet([pa.array(ids), pa.array(ids)])
    assert len(found) == len(ids)
    assert found.contains(ids[::-1]).all()
    assert not found.contains([f"{first:016x}{second:016x}" for first in (0, 1, 2**64 - 1) for second in (4, 6)]).any()


def test_idset_reads_any_slice_of_a_column() -> None:
    ids = [secrets.token_hex(16) for _ in range(10)]
    for kind in (pa.string(), pa.large_string()):
        assert IdSet([pa.array(ids, kind)[3:7]]).contains(ids).tolist() == [3 <= at < 7 for at in range(10)]
