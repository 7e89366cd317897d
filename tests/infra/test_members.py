from __future__ import annotations

import hashlib
import pickle
from typing import Any

import pytest

from infra.members import MemberError, read_member, read_members
from infra.shard import build_tar
from infra.storage import Storage

SHARD = "media/run/0.tar"


@pytest.fixture
def items(storage: Storage) -> list[dict[str, Any]]:
    """References to three members of a shard."""
    contents = {"a.png": b"first", "b.png": b"second", "c.png": b"third"}
    data, places = build_tar([*contents.items()])
    storage.write_bytes(SHARD, data)
    return [
        {"shard": SHARD, "member": name, "offset": at, "nbytes": nbytes, "sha256": hashlib.sha256(held).hexdigest()}
        for (name, held), (at, nbytes) in zip(contents.items(), places.values(), strict=True)
    ]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "broken": ({"shard": "../0.tar"}, "lies outside of the dataset"),
    "missing": ({"shard": "media/run/gone.tar"}, "is not there"),
    "changed": ({"offset": 10**6}, "its bytes do not have the recorded sha256"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_member_that_is_not_what_was_recorded_is_told_in_a_line(
    storage: Storage, items: list[dict[str, Any]], kind: str
) -> None:
    change, said = WRONG[kind]
    assert read_member(storage, items[0]) == b"first"
    with pytest.raises(MemberError) as caught:
        read_member(storage, items[0] | change | {"member": "a\nb.png"})
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.kind, error.said) == (kind, said)
    assert str(error).startswith(f"{change.get('shard', SHARD)} a b.png: {said}; withdraw the sample")


@pytest.mark.parametrize("kind", WRONG)
def test_members_are_read_beside_one_that_cannot_be(storage: Storage, items: list[dict[str, Any]], kind: str) -> None:
    items[1] |= WRONG[kind][0]
    first, second, third = read_members(storage, items)
    assert (first, third) == (b"first", b"third")
    assert isinstance(second, MemberError) and second.kind == kind


def test_no_members_are_none(storage: Storage) -> None:
    assert list(read_members(storage, [])) == []
