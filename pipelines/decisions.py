"""What annotations say of samples: facts are never rewritten, so a sample is its row with its decisions applied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.schema import SAMPLES
from infra.storage import Storage
from infra.tables import Table
from stages.annotate import caption_name

UNDONE = ("false", "no", "0")
"""Values of a `withdrawn` annotation that take an earlier one back; any other withdraws the sample."""

DECIDED = pa.schema([*SAMPLES, ("label", pa.string())])
"""Columns of a sample with its decisions applied: those of `samples`, and the last label or ''."""

CHANGED = ("verdict", "reasons", "judge", "rubric", "scores", "caption", "captions", "tags", "label")
"""Columns that a decision may change."""


_EMPTY: dict[str, Any] = {}
"""Shared by the decisions that have none: there may be millions."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the annotations say of one sample; what is empty leaves the sample's own."""

    verdict: str = ""
    decided_by: str = ""
    rubric: str = ""
    """Of the verdict."""
    reasons: tuple[str, ...] = ()
    """Of the verdict."""
    captions: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    """Style, or style/scene -> text; an empty one says that there is none."""
    captioned_by: Mapping[str, tuple[str, str]] = field(default_factory=lambda: _EMPTY)
    """The same -> captioner and its settings."""
    scores: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    tags: tuple[str, ...] = ()
    label: str = ""
    withdrawn: bool = False


NONE = Decision()


def read_decisions(storage: Storage, until: int | None = None) -> dict[str, Decision]:
    """Sample id -> its decision. Of annotations of one kind and name the highest commit, then the last row, wins.

    `until` is a version of the table; left out, the newest.
    """
    known: dict[str, str] = {}  # one text for each annotator and rubric, however many rows name it
    said: dict[str, dict[str, Any]] = {}
    for row in in_commit_order(Table(storage, "annotations"), until):
        one = said.setdefault(row["sample_id"], {})
        kind, name, value = row["kind"], row["name"] or "", row["value"] or ""
        annotator, rubric = (known.setdefault(text, text) for text in (row["annotator"] or "", row["rubric"] or ""))
        if kind == "verdict":
            one |= {"verdict": value, "decided_by": annotator or "an annotation", "rubric": rubric, "reasons": ()}
        elif kind == "note" and name == "verdict":  # follows its verdict
            one["reasons"] = (*one.get("reasons", ()), value)
        elif kind == "caption":
            one.setdefault("captions", {})[name or "short"] = value
            one.setdefault("captioned_by", {})[name or "short"] = (annotator, rubric)
        elif kind == "score":
            if (number := _number(value)) is not None:
                one.setdefault("scores", {})[known.setdefault(name, name)] = number
        elif kind == "label":
            one["label"] = value
        elif kind == "tag":
            one["tags"] = tuple(dict.fromkeys((*one.get("tags", ()), value)))
        elif kind == "withdrawn":
            one["withdrawn"] = value.lower() not in UNDONE
    return {sample_id: Decision(**said.pop(sample_id)) for sample_id in list(said)}


def read_scores(storage: Storage, annotator: str, asked: str) -> dict[str, dict[str, float]]:
    """Sample id -> what `annotator` answered to `asked` in annotations."""
    by_them = (pc.field("kind") == "score") & (pc.field("annotator") == annotator) & (pc.field("rubric") == asked)
    found: dict[str, dict[str, float]] = {}
    for batch in Table(storage, "annotations").batches(["sample_id", "name", "value"], by_them):
        for row in batch.to_pylist():
            number = _number(row["value"])
            if number is not None:
                found.setdefault(row["sample_id"], {})[row["name"]] = number
    return found


def count_accepted(storage: Storage, rows: pc.Expression | None = None) -> int:
    """Samples that are accepted now, by their own verdict or a later one, and not withdrawn; of all, or of some `rows`."""
    decisions = read_decisions(storage)
    samples = Table(storage, "samples")
    if not decisions:
        accepted = pc.field("verdict") == "accepted"
        return int(samples.dataset().count_rows(filter=accepted if rows is None else accepted & rows))
    found = (apply(batch, decisions).column("verdict") for batch in samples.batches(["sample_id", "verdict"], rows))
    return sum(pc.sum(pc.equal(verdicts, "accepted")).as_py() or 0 for verdicts in found)


def apply(batch: pa.RecordBatch, decisions: Mapping[str, Decision]) -> pa.RecordBatch:
    """Rows of `samples` with their decisions applied and without what is withdrawn.

    `batch` has `sample_id` and any others of the table's columns; the result has the same ones, and `label`. `caption`
    needs `captions` beside it.
    """
    found = [decisions.get(sample_id) for sample_id in batch.column("sample_id").to_pylist()]
    labels = pa.array(["" if one is None else one.label for one in found], pa.string())
    batch = pa.record_batch([*batch.columns, labels], schema=batch.schema.append(pa.field("label", pa.string())))
    if not any(one is not None for one in found):
        return batch
    changed = [name for name in batch.schema.names if name in CHANGED and name != "label"]
    rows = batch.select(changed).to_pylist()
    rows = [row if one is None else decided(row, one) for row, one in zip(rows, found, strict=True)]
    for name in changed:
        at = batch.schema.get_field_index(name)
        batch = batch.set_column(
            at, batch.schema.field(at), pa.array([row[name] for row in rows], DECIDED.field(name).type)
        )
    return batch.filter(pa.array([one is None or not one.withdrawn for one in found]))


def decided(row: Mapping[str, Any], decision: Decision) -> dict[str, Any]:
    """`row`, which may hold some columns only, with `decision` applied to the columns that it has."""
    new = dict(row)
    if decision.verdict:
        new |= {
            "verdict": decision.verdict,
            "reasons": list(decision.reasons),
            "judge": decision.decided_by,
            "rubric": decision.rubric,
        }
    if decision.scores and "scores" in row:
        scores = {item["name"]: item["value"] for item in row["scores"] or ()} | dict(decision.scores)
        new["scores"] = [{"name": name, "value": value} for name, value in scores.items()]
    if decision.captions and "captions" in row:
        new["captions"] = _captions(row["captions"] or (), decision)
        new["caption"] = next((item["text"] for item in new["captions"] if not item["scene"]), "")
    if decision.tags and "tags" in row:
        new["tags"] = list(dict.fromkeys((*(row["tags"] or ()), *decision.tags)))
    new["label"] = decision.label
    return {name: new[name] for name in (*row, "label")}


def _captions(before: Iterable[dict[str, Any]], decision: Decision) -> list[dict[str, Any]]:
    """The captions, each decided one in the place of the first old one of its style and scene, or at the end."""
    texts = dict(decision.captions)
    names = dict.fromkeys([*(caption_name(item) for item in before), *texts])
    found: list[dict[str, Any]] = []
    for name in names:
        if name not in texts:
            found += [item for item in before if caption_name(item) == name]
        elif texts[name]:
            style, _, scene = name.rpartition("/")
            of_scene = bool(style) and scene.isdecimal() and len(scene) < 10
            said = {"style": style, "scene": int(scene)} if of_scene else {"style": name, "scene": 0}
            model = decision.captioned_by[name][0]
            found.append({**said, "language": "en", "text": texts[name], "model": model})
    return found


def in_commit_order(
    table: Table, until: int | None = None, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a table, oldest commit first; `until` is a version, left out the newest."""
    handle = table.handle()
    if handle is None:
        return
    live = set(table.files())
    for commit in table.commits_since(-1, handle.version() if until is None else until):
        files = [name for name in commit.added if name in live]
        if files:
            for batch in table.dataset(files).to_batches(columns=columns):
                yield from batch.to_pylist()


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
