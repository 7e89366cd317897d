"""What annotations say of samples: facts are never rewritten, so a sample is its row with its decisions applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.storage import Storage
from infra.tables import Table

UNDONE = ("false", "no", "0")
"""Values of a `withdrawn` annotation that take an earlier one back; any other withdraws the sample."""


@dataclass(frozen=True)
class Decision:
    """What the annotations say of one sample; what is empty leaves the sample's own."""

    verdict: str = ""
    decided_by: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)
    """Style -> text."""
    scores: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    label: str = ""
    withdrawn: bool = False


def read_decisions(storage: Storage) -> dict[str, Decision]:
    """Sample id -> its decision. Of annotations of one kind and name the highest commit, then the last row, wins."""
    said: dict[str, dict[str, Any]] = {}
    for row in _in_commit_order(Table(storage, "annotations")):
        one = said.setdefault(row["sample_id"], {"captions": {}, "scores": {}, "tags": {}})
        kind, name, value = row["kind"], row["name"] or "", row["value"] or ""
        if kind == "verdict":
            one["verdict"], one["decided_by"] = value, row["annotator"] or "an annotation"
        elif kind == "caption":
            one["captions"][name or "short"] = value
        elif kind == "score":
            one["scores"][name] = _number(value)
        elif kind == "label":
            one["label"] = value
        elif kind == "tag":
            one["tags"][value] = None
        elif kind == "withdrawn":
            one["withdrawn"] = value.lower() not in UNDONE
    return {
        sample_id: Decision(
            **{
                **one,
                "tags": tuple(one["tags"]),
                "scores": {name: value for name, value in one["scores"].items() if value is not None},
            }
        )
        for sample_id, one in said.items()
    }


def _in_commit_order(table: Table) -> Iterator[dict[str, Any]]:
    handle = table.handle()
    if handle is None:
        return
    live = set(table.files())
    for commit in table.commits_since(-1, handle.version()):
        files = [name for name in commit.added if name in live]
        if files:
            yield from table.dataset(files).to_table().to_pylist()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
