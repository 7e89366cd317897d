"""WriteAnnotations: what a judge or a captioner says of samples that exist already, as closed parts of `annotations`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import pyarrow as pa

from infra.commit import Part, write_part
from infra.schema import ANNOTATIONS
from infra.storage import Storage
from stages.batch import Batch, jsons, load_json

Row = dict[str, Any]

SHOWN = 3


def caption_name(item: Mapping[str, Any]) -> str:
    """Under what a caption is annotated: its style, and the scene that it is of, if that is not the whole."""
    return f"{item['style']}/{item['scene']}" if item.get("scene") else str(item["style"])


@dataclass(frozen=True)
class Annotator:
    """Who says something, in which run. Scores depend on what was `asked`; verdicts on the bounds in `rubric` too."""

    storage: Storage
    run_id: str
    name: str
    rubric: str = ""
    asked: str = ""

    def row(self, sample_id: str, kind: str, name: str, value: str, rubric: str = "") -> Row:
        """One annotation. `created_at` is that of the part."""
        return {
            "sample_id": sample_id,
            "kind": kind,
            "name": name,
            "value": value,
            "annotator": self.name,
            "rubric": rubric,
            "run_id": self.run_id,
        }

    def scores(self, sample_id: str, scores: Mapping[str, float]) -> list[Row]:
        return [self.row(sample_id, "score", name, repr(float(value)), self.asked) for name, value in scores.items()]

    def verdict(self, sample_id: str, verdict: str, reasons: Sequence[str]) -> list[Row]:
        """A verdict, followed by its reasons."""
        notes = [self.row(sample_id, "note", "verdict", reason, self.rubric) for reason in dict.fromkeys(reasons)]
        return [self.row(sample_id, "verdict", "", verdict, self.rubric), *notes]

    def captions(self, sample_id: str, captions: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Each under its style, or style/scene. An empty text says that there is none."""
        return [self.row(sample_id, "caption", caption_name(item), item["text"], self.rubric) for item in captions]

    def write(self, rows: Sequence[Row], number: int) -> Part:
        """The rows as a part that waits for its commit."""
        now = datetime.now(UTC)
        table = pa.Table.from_pylist([{**row, "created_at": now} for row in rows], ANNOTATIONS)
        return write_part(self.storage, f"annotations/{self.run_id}-{number:08d}-{uuid4().hex[:8]}.parquet", table)


@dataclass(frozen=True)
class WriteAnnotations:
    """Writes what JudgeQuality or CaptionMedia added to a batch, and returns one row: column `result`, a JSON text of

        batch_index, parts: [{table, path, nbytes, rows}], accepted, rejected, captioned, failed, errors: a few texts, ledger

    It keeps nothing between calls. A failed sample gets no annotation, so that the next try takes it again.
    """

    annotator: Annotator

    name: ClassVar[str] = "annotate"
    reads: ClassVar[tuple[str, ...]] = ("sample_id", "scores", "verdict", "reasons", "decomposed", "captions")
    adds: ClassVar[tuple[str, ...]] = ("result",)
    skips_rejected: ClassVar[bool] = False
    takes_failed: ClassVar[bool] = True

    def load(self) -> None:
        """Nothing."""

    def __call__(self, batch: Batch) -> Batch:
        live = np.flatnonzero(batch["error_type"] == "").tolist()
        rows = [row for at in live for row in self._said(batch, at)]
        number = int(batch["batch_index"][0])
        parts = [self.annotator.write(rows, number)] if rows else []
        judged = "verdict" in batch
        verdicts = list(batch["verdict"][live]) if judged else []
        broken = np.flatnonzero(batch["error_type"] != "")
        result = {
            "batch_index": number,
            "parts": [{"table": "annotations", **asdict(part)} for part in parts],
            "accepted": verdicts.count("accepted"),
            "rejected": verdicts.count("rejected"),
            "captioned": 0 if judged else len(live),
            "failed": len(broken),
            "errors": [f"{batch['sample_id'][at]}: {batch['error'][at]}" for at in broken[:SHOWN]],
            "ledger": load_json(batch["ledger"][:1])[0] if "ledger" in batch else [],
        }
        return {"result": jsons([result])}

    def _said(self, batch: Batch, at: int) -> Iterator[Row]:
        sample_id = str(batch["sample_id"][at])
        if "verdict" in batch:
            (scores,) = load_json(batch["scores"][at : at + 1])
            (reasons,) = load_json(batch["reasons"][at : at + 1])
            yield from self.annotator.scores(sample_id, {item["name"]: item["value"] for item in scores})
            yield from self.annotator.verdict(sample_id, str(batch["verdict"][at]), reasons)
        if answers := str(batch["decomposed"][at]) if "decomposed" in batch else "":
            yield self.annotator.row(sample_id, "note", "decomposed", answers, self.annotator.asked)
        if "captions" in batch:
            (captions,) = load_json(batch["captions"][at : at + 1])
            yield from self.annotator.captions(sample_id, captions)
