"""The funnel of a curated dataset: what each filter removed, in clips and hours, with examples, and what another bound would.

It is read from stored rows alone. A sample counts at its first reason, in the order in which filters were asked; withdrawn
samples and later verdicts count as annotations have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from infra.errors import UserError
from infra.storage import Storage
from infra.tables import Table
from pipelines.decisions import Decision, apply, read_decisions
from pipelines.report_data import reason_kind

EXAMPLES = 3
POINTS = 9
COLUMNS = ["sample_id", "verdict", "reasons", "scores", "inputs", "num_frames", "fps"]
_DROPPED = re.compile(r"^(\w+)")

Side = Literal["least", "most"]


@dataclass
class Removed:
    """What one filter removed. `of` says what is counted: files, scenes of files, or clips."""

    name: str
    of: Literal["file", "scene", "clip"]
    count: int = 0
    seconds: float = 0.0
    examples: list[str] = field(default_factory=list)

    def add(self, seconds: float, example: str) -> None:
        self.count += 1
        self.seconds += seconds
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass(frozen=True)
class Funnel:
    """`listed` files of `listed_seconds`, `clips` cut out of them, `kept` of these, and what was removed on the way.

    Seconds of files that nobody could read are not known, and not in `listed_seconds`.
    """

    listed: int
    listed_seconds: float
    clips: int
    clip_seconds: float
    kept: int
    kept_seconds: float
    removed: tuple[Removed, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"files    {self.listed:>9,}  {_hours(self.listed_seconds)}"
        for of in ("file", "scene", "clip"):
            if of == "clip":
                yield f"clips    {self.clips:>9,}  {_hours(self.clip_seconds)}"
            for step in self.removed:
                if step.of == of:
                    yield f"  -{step.count:>8,} {of + 's':<6} {_hours(step.seconds)}  {step.name}"
                    yield from (f"        {example}" for example in step.examples)
        yield f"accepted {self.kept:>9,}  {_hours(self.kept_seconds)}"


@dataclass(frozen=True)
class Point:
    """What a bound would keep. `unknown` are samples that an earlier filter rejected before they had this score."""

    threshold: float
    kept: int
    seconds: float
    unknown: int


def read_funnel(storage: Storage) -> Funnel:
    """The funnel of all files and samples of a dataset, in one pass over each table."""
    removed: dict[tuple[str, str], Removed] = {}
    listed, listed_seconds = 0, 0.0
    for batch in Table(storage, "sources").batches(["uri", "seconds", "dropped", "error_type"]):
        for row in batch.to_pylist():
            listed, listed_seconds = listed + 1, listed_seconds + (row["seconds"] or 0.0)
            if row["error_type"] and row["error_type"] != "no_clip":
                _step(removed, row["error_type"], "file").add(row["seconds"] or 0.0, row["uri"])
            for drop in row["dropped"] or ():
                name = found[1] if (found := _DROPPED.match(drop["reason"])) else drop["reason"]
                place = _place(row["uri"], drop["start"], drop["end"])
                _step(removed, name, "scene").add(drop["end"] - drop["start"], place)
    clips, clip_seconds, kept, kept_seconds = 0, 0.0, 0, 0.0
    for row in _samples(storage, read_decisions(storage)):
        seconds = _seconds(row)
        clips, clip_seconds = clips + 1, clip_seconds + seconds
        if row["verdict"] == "accepted":
            kept, kept_seconds = kept + 1, kept_seconds + seconds
        else:
            name = reason_kind(row["reasons"][0]) if row["reasons"] else "no reason"
            clip = (row["inputs"] or [{"uri": row["sample_id"], "start": None, "end": None}])[0]
            _step(removed, name, "clip").add(seconds, _place(clip["uri"], clip["start"], clip["end"]))
    steps = tuple(sorted(removed.values(), key=lambda step: (step.of != "file", step.of != "scene", -step.count)))
    return Funnel(listed, listed_seconds, clips, clip_seconds, kept, kept_seconds, steps)


def sweep(storage: Storage, name: str, side: Side, thresholds: list[float] | None = None) -> list[Point]:
    """What the dataset would hold with another bound on one score, all others as they were: `least`, samples of at least the
    threshold stay; `most`, those of at most it. Left out, thresholds are tenths of the stored scores.

    UserError where no sample has the score.
    """
    found: list[tuple[float, float]] = []
    unknown: list[None] = []
    for row in _samples(storage, read_decisions(storage)):
        if any(reason_kind(reason).split()[0].rstrip(":") != name for reason in row["reasons"] or ()):
            if name not in {score["name"] for score in row["scores"]}:
                unknown.append(None)
            continue
        score = next((score["value"] for score in row["scores"] if score["name"] == name), None)
        if score is not None:
            found.append((score, _seconds(row)))
    if not found:
        raise UserError(f"sweep: no sample has a score {name!r}; `ditmill report` shows those that there are")
    values, seconds = np.array(found).T
    if thresholds is None:
        thresholds = sorted({float(at) for at in np.quantile(values, np.linspace(0.1, 0.9, POINTS))})
    stays = [values >= at if side == "least" else values <= at for at in thresholds]
    return [
        Point(at, int(stay.sum()), float(seconds[stay].sum()), len(unknown))
        for at, stay in zip(thresholds, stays, strict=True)
    ]


def _samples(storage: Storage, decisions: Mapping[str, Decision]) -> Iterator[dict[str, Any]]:
    for batch in Table(storage, "samples").batches(COLUMNS):
        yield from apply(batch, decisions).to_pylist()


def _step(removed: dict[tuple[str, str], Removed], name: str, of: Literal["file", "scene", "clip"]) -> Removed:
    return removed.setdefault((name, of), Removed(name, of))


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row["num_frames"] / row["fps"]) if row["num_frames"] > 1 and row["fps"] else 0.0


def _place(uri: str, start: float | None, end: float | None) -> str:
    return uri if start is None or end is None else f"{uri} {start:.2f}-{end:.2f} s"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:>10.3f} h"
