"""New decisions about samples that exist: by a judge, by a captioner, from a file of labels; withdrawals.

An annotation is appended and never rewrites anything; what holds of a sample is in `pipelines.decisions`. Kinds: score
(name: which), verdict, caption (name: style), label, tag, withdrawn (value true or false), and note (name: the kind that it
explains, a verdict's reasons among them, right after it).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from infra.commit import Committer
from infra.errors import UserError
from infra.storage import Storage
from infra.tables import Table
from pipelines.idset import IdSet
from stages.annotate import Annotator, Row

if TYPE_CHECKING:
    from infra.ray_session import Cluster
    from pipelines.generate import StopRequest
    from pipelines.resolve import Resolved

SAMPLE_ID = re.compile(r"[0-9a-f]{32}")
SHOWN = 3

Scope = Literal["all", "accepted", "rejected", "missing"]


@dataclass(frozen=True)
class Annotated:
    """What a call of this module said of how many samples.

    `samples` counts those with a new annotation, `accepted` and `rejected` its verdicts; `unchanged` those of which the same
    was known, `skipped` those of which too little is stored, `failed` those that could not be read or judged.
    """

    kind: str
    run_id: str
    annotator: str
    samples: int
    accepted: int = 0
    rejected: int = 0
    unchanged: int = 0
    skipped: int = 0
    failed: int = 0
    errors: tuple[str, ...] = ()
    status: str = "done"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        said = f"{self.kind}: {self.samples} samples by {self.annotator}"
        if self.accepted or self.rejected:
            said += f", {self.accepted} accepted, {self.rejected} rejected"
        if self.unchanged:
            said += f"; {self.unchanged} unchanged"
        if self.skipped:
            said += f"; {self.skipped} skipped: too little of them is stored (see output.keep_rejected)"
        if self.failed:
            said += f"; {self.failed} failed, the next try takes them again: {'; '.join(self.errors)}"
        return said if self.status == "done" else f"{said}; {self.status}"


def rejudge(
    run: Resolved, cluster: Callable[[], Cluster], scope: Scope = "all", stop: StopRequest | None = None
) -> Annotated:
    """Judge stored samples by the run's bounds, judge, rubric and thresholds.

    Where the same judge has answered the same questions before, its scores decide again and no model runs: a changed
    threshold costs nothing. A sample that is judged like that already is left as it is, so that a call that was cut short
    goes on where it was.

    Args:
        run: the resolved spec.
        cluster: connects to Ray; called only if a model must run.
        scope: only samples with this verdict now.
        stop: set it to end early.
    """
    from pipelines.annotate_stored import Judging, annotate_stored

    return annotate_stored(run, cluster, Judging, scope, stop)


def recaption(
    run: Resolved, cluster: Callable[[], Cluster], scope: Scope = "accepted", stop: StopRequest | None = None
) -> Annotated:
    """Caption stored samples by the run's captioner; as `rejudge`. Scope `missing`: accepted ones that lack a style."""
    from pipelines.annotate_stored import Captioning, annotate_stored

    if run.captioner is None:
        raise UserError("caption: the spec has no captioner; give it a section `caption`")
    return annotate_stored(run, cluster, Captioning, scope, stop)


def label(storage: Storage, csv_path: str, annotator: str = "labels") -> Annotated:
    """Labels from a CSV of sample_id,label[,note], as the gallery writes it; of two lines on a sample the later holds.

    UserError, and nothing is written, where the file is no such CSV or names a sample that the dataset does not have.
    """
    labels = read_labels(csv_path)
    _check_ids(
        storage, {sample_id: f"{csv_path}: line {line}: sample_id" for sample_id, (line, _, _) in labels.items()}
    )
    who = _person(storage, annotator)
    rows: list[Row] = []
    for sample_id, (_, value, note) in labels.items():
        rows.append(who.row(sample_id, "label", "", value))
        if note:
            rows.append(who.row(sample_id, "note", "label", note))
    _commit(who, rows)
    return Annotated("label", who.run_id, annotator, samples=len(labels))


def withdraw(storage: Storage, sample_ids: Sequence[str], reason: str = "", annotator: str = "owner") -> Annotated:
    """Take samples out of all later releases. UserError where the dataset has no such sample."""
    return _withdraw(storage, sample_ids, "true", reason, annotator)


def restore(storage: Storage, sample_ids: Sequence[str], reason: str = "", annotator: str = "owner") -> Annotated:
    """Take withdrawals back."""
    return _withdraw(storage, sample_ids, "false", reason, annotator)


def _withdraw(storage: Storage, sample_ids: Sequence[str], value: str, reason: str, annotator: str) -> Annotated:
    wanted = list(dict.fromkeys(sample_ids))
    _check_ids(storage, dict.fromkeys(wanted, "sample"))
    who = _person(storage, annotator)
    rows: list[Row] = []
    for sample_id in wanted:
        rows.append(who.row(sample_id, "withdrawn", "", value))
        if reason:
            rows.append(who.row(sample_id, "note", "withdrawn", reason))
    _commit(who, rows)
    return Annotated("withdraw" if value == "true" else "restore", who.run_id, annotator, samples=len(wanted))


def _person(storage: Storage, name: str) -> Annotator:
    from pipelines.resolve import new_run_id

    return Annotator(storage, new_run_id(), name)


def _commit(who: Annotator, rows: list[Row]) -> None:
    if rows:
        committer = Committer(Table(who.storage, "annotations"), who.run_id)
        committer.commit([who.write(rows, 0)])


def _check_ids(storage: Storage, where: dict[str, str]) -> None:
    """UserError that names the first of the ids that is no sample's."""
    known = IdSet(batch.column("sample_id") for batch in Table(storage, "samples").batches(["sample_id"]))
    sound = [sample_id for sample_id in where if SAMPLE_ID.fullmatch(sample_id)]
    there = {sample_id for sample_id, is_there in zip(sound, known.contains(sound), strict=True) if is_there}
    unknown = [sample_id for sample_id in where if sample_id not in there]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(f"{where[unknown[0]]}: {storage.root} has no sample {unknown[0]!r}{more}; nothing was written")


def read_labels(path: str) -> dict[str, tuple[int, str, str]]:
    """sample_id -> line, label, note."""
    text = _read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)  # spreadsheets write what the country takes for a comma
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found: dict[str, tuple[int, str, str]] = {}
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        for name in ("sample_id", "label"):
            if name not in columns:
                found_columns = " ".join(",".join(columns)[:100].split())
                raise UserError(
                    f"{path}: line 1: expected columns sample_id,label[,note], found {found_columns or 'none'}"
                )
        reader.fieldnames = columns
        for row in reader:
            sample_id, value = (row["sample_id"] or "").strip(), (row["label"] or "").strip()
            if not sample_id and not value:
                continue
            if not value:
                raise UserError(f"{path}: line {reader.line_num}: label: expected a label such as y or n, found none")
            found.pop(sample_id, None)
            found[sample_id] = (reader.line_num, value, _plain(row.get("note")))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: is not CSV ({error})") from error
    if not found:
        raise UserError(f"{path}: holds no labels")
    return found


def _read_text(path: str) -> str:
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()
    except Exception as error:  # every kind of store has errors of its own
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({said}); give a CSV of sample_id,label") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text ({error.reason} at byte {error.start}); save it as UTF-8 CSV") from error
    if "\0" in text:
        raise UserError(f"{path}: is not a CSV file; give a CSV of sample_id,label")
    return text


def _plain(note: str | None) -> str:
    """A note without the quote that keeps spreadsheets from running it."""
    text = (note or "").strip()
    return text[1:] if re.match(r"'[=+\-@\t\r]", text) else text
