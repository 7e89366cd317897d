"""What the `runs` table says: one `Run` for each invocation, from the row of its start and the row of its end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from infra.errors import UserError
from infra.secrets import redact
from stages.rubric import load_rubric, with_decomposed

NO_POINTS: Mapping[str, float] = MappingProxyType({})

LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Run:
    """One invocation. `allocated` is in accelerator-seconds, None for a run that lives, was killed or broke."""

    run_id: str
    status: str
    command: str
    started: datetime | None
    ended: datetime | None
    planned_through: int
    """How many samples of its enumeration it took on; 0 where it did not say."""
    allocated: float | None
    overhead: Mapping[str, float]
    """What the allocated time went to besides samples (load, idle, ...), in accelerator-seconds."""
    spec: Mapping[str, Any]
    versions: Mapping[str, Any]
    hosts: Any
    licences: Any
    reproducible: str
    points: Mapping[str, float] = field(default_factory=dict)
    """Thresholds that it found (see pipelines.thresholds)."""


@dataclass(frozen=True)
class Threshold:
    """A bound on a score: `least` where the sample must have at least `value`, else at most."""

    value: float
    least: bool


def read_runs(rows: Iterable[dict[str, Any]]) -> tuple[Run, ...]:
    """The runs in the rows of `runs`, oldest first."""
    events: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        events.setdefault(row["run_id"], {})[row["event"]] = row
    runs = [_run(run_id, event.get("started", {}), event.get("ended", {})) for run_id, event in events.items()]
    return tuple(sorted(runs, key=lambda run: run.started or run.ended or LONG_AGO))


def _run(run_id: str, first: dict[str, Any], last: dict[str, Any]) -> Run:
    def said(key: str) -> Any:
        return last.get(key) or first.get(key)

    return Run(
        run_id=run_id,
        status=last.get("status") or "did not end",
        command=redact(said("command") or ""),
        started=first.get("created_at"),
        ended=last.get("created_at"),
        planned_through=last.get("planned_through") or 0,
        allocated=last.get("allocated_accelerator_seconds"),
        overhead=_numbers(_json(said("overhead_json"))),
        spec=_object(_json(said("spec_json"))),
        versions=_object(_json(said("versions_json"))),
        hosts=_json(said("hosts_json")),
        licences=_json(said("licences_json")),
        reproducible=said("reproducible") or "",
        points={
            point["question"]: point["threshold"] for point in _object(_json(said("extra_json"))).get("points", ())
        },
    )


def thresholds(spec: Mapping[str, Any], points: Mapping[str, float] = NO_POINTS) -> dict[str, list[Threshold]]:
    """Score name -> the bounds that a resolved spec puts on it, with the thresholds that its run found."""
    found: dict[str, list[Threshold]] = {}
    for key, value in (_object(spec.get("score")) | _object(spec.get("texture"))).items():
        side, _, name = key.partition("_")
        if side in ("min", "max") and value is not None:
            found.setdefault(name, []).append(Threshold(float(value), side == "min"))
    judge = _object(spec.get("judge"))
    sought = {name for name, bar in _object(judge.get("thresholds")).items() if isinstance(bar, dict)}
    bars = {name: bar for name, bar in _judge_thresholds(judge).items() if name not in sought}
    for name, value in (bars | dict(points)).items():
        found.setdefault(name, []).append(Threshold(value, True))
    return found


def _judge_thresholds(judge: Mapping[str, Any]) -> dict[str, float]:
    own = _numbers(judge.get("thresholds"))
    if judge.get("backend") != "transformers":
        return own
    try:
        named, decompose = judge.get("rubric"), _object(judge.get("decompose"))
        rubric = load_rubric(list(map(str, named)) if isinstance(named, list) else str(named))
        return (with_decomposed(rubric, decompose["threshold"]) if decompose else rubric).thresholds(own)
    except UserError:  # a rubric file that is not on this machine
        return own


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    return {
        str(name): float(number)
        for name, number in _object(value).items()
        if isinstance(number, int | float) and not isinstance(number, bool)
    }
