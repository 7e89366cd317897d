"""Thresholds of the judge that the spec leaves to be found: by labels before each run, by a share on the first samples.

Where one was found on the first samples it stays: `runs` has it, for as long as judge and questions are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import UserError
from infra.tables import Table
from infra.telemetry import log
from pipelines.annotate import read_labels
from pipelines.answers import Answers
from pipelines.decisions import in_commit_order, read_decisions
from pipelines.early import early_told
from pipelines.operating_point import LEAST, OperatingPoint, by_precision, by_share
from pipelines.resolve import Resolved
from pipelines.viewers import Bar
from stages.rubric import OVERALL

GOOD = ("y", "yes", "good", "accept", "accepted", "true", "1")
BAD = ("n", "no", "bad", "reject", "rejected", "false", "0")
"""Labels that count, in any case; others, such as unsure, do not."""


def find_thresholds(run: Resolved) -> Resolved:
    """`run` with `points`, the thresholds that were found.

    A share without `first` is left to releases; one whose first samples are not there yet lets everything pass.
    UserError where labels are too few, or no threshold reaches the precision.
    """
    points = []
    for name, bar in run.spec.judge.thresholds.items():
        if not isinstance(bar, Bar):
            continue
        point = None
        if bar.precision is not None:
            point = _by_labels(run, name, bar)
        elif bar.first is not None:
            point = _found_before(run, name, bar) or _on_the_first(run, name, bar)
        if point is not None:
            points.append(point)
            log().info("threshold found", **asdict(point))
    return replace(run, points=tuple(points))


def told(run: Resolved) -> list[str]:
    """A line for each threshold that was found, or that lets everything pass for now; and on early rejection."""
    lines = [*map(str, run.points), *early_told(run)]
    found = {point.question for point in run.points}
    for name, bar in run.spec.judge.thresholds.items():
        if isinstance(bar, Bar) and name not in found:
            when = f"once {bar.first} samples are answered, by the next run" if bar.first else "by each release"
            lines.append(f"judge.thresholds.{name}: {bar} will be found {when}; until then everything passes it")
    return lines


def _by_labels(run: Resolved, name: str, bar: Bar) -> OperatingPoint:
    assert bar.precision is not None
    key = f"judge.thresholds.{name}"
    labels = _labels(run, key, bar.labels)
    answers = Answers(run)
    found: list[tuple[float, bool]] = []
    where = pc.field("sample_id").isin(pa.array(labels, pa.string()))
    for batch in Table(run.storage, "samples").batches(list(Answers.columns), where):
        for row in batch.to_pylist():
            score = _score(run, answers.of(row), name)
            if score is not None:
                found.append((score, labels[row["sample_id"]]))
    scores, good = np.array([score for score, _ in found]), np.array([label for _, label in found], dtype=bool)
    if min(good.sum(), (~good).sum()) < LEAST:
        raise UserError(
            f"{key}: {len(labels)} labels say yes or no, and of their samples this judge was asked this of"
            f" {int(good.sum())} good and {int((~good).sum())} bad ones; expected at least {LEAST} of each: begin with a"
            " number, label samples in the report, and give the file here (after a change of judge or rubric run `ditmill"
            " annotate --judge` with a number first)"
        )
    point = by_precision(name, str(bar), scores, good, bar.precision)
    if point is None:
        raise UserError(
            f"{key}.precision: no threshold reaches {bar.precision:g} on {len(good)} labels, {good.mean():.0%} of them good;"
            " lower it, label more, or take a better judge"
        )
    return point


def _labels(run: Resolved, key: str, path: str | None) -> dict[str, bool]:
    """Sample id -> whether it is good, of those that were said to be one or the other."""
    if path is None:
        said = {sample_id: one.label for sample_id, one in read_decisions(run.storage).items() if one.label}
    else:
        try:
            said = {sample_id: value for sample_id, (_, value, _) in read_labels(path).items()}
        except UserError as error:
            raise UserError(f"{key}.labels: {error}") from error
    return {sample_id: value.lower() in GOOD for sample_id, value in said.items() if value.lower() in GOOD + BAD}


def _on_the_first(run: Resolved, name: str, bar: Bar) -> OperatingPoint | None:
    assert bar.keep is not None and bar.first is not None
    scores: list[float] = []
    for score in _scores(run, name):
        scores.append(score)
        if len(scores) == bar.first:
            return by_share(name, str(bar), np.array(scores), bar.keep)
    return None


def _scores(run: Resolved, name: str) -> Iterator[float]:
    """What this judge answered, in the order in which the samples were committed."""
    answers = Answers(run)
    for row in in_commit_order(Table(run.storage, "samples"), columns=list(Answers.columns)):
        if (score := _score(run, answers.of(row), name)) is not None:
            yield score


def _score(run: Resolved, answers: dict[str, float], name: str) -> float | None:
    """The answer to question `name`; `overall` is the weighted mean of those that there are. None where there is none."""
    if name != OVERALL or name in answers:
        return answers.get(name)
    found = run.rubric.overall(answers)
    return found if np.isfinite(found) else None


def _found_before(run: Resolved, name: str, bar: Bar) -> OperatingPoint | None:
    """What an earlier run found for the same aim with this judge and these questions."""
    mine = {"question": name, "aim": str(bar), **_who(run, name)}
    for text in Table(run.storage, "runs").read(["extra_json"])["extra_json"].to_pylist():
        for said in json.loads(text or "{}").get("points", ()):
            if mine.items() <= said.items():
                return OperatingPoint(**{key: said[key] for key in said if key not in ("judge", "asked")})
    return None


def as_told(run: Resolved) -> dict[str, Any]:
    """What a run's row says of its points."""
    return {"points": [asdict(point) | _who(run, point.question) for point in run.points]} if run.points else {}


def _who(run: Resolved, name: str) -> dict[str, str]:
    """What a score depends on: who was asked what, and for `overall` how answers are weighed."""
    weighed = f"/{run.rubric.sha256[:12]}" if name == OVERALL else ""
    return {"judge": run.judge_name, "asked": run.asked + weighed}
