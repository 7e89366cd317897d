"""What a dataset's tables say, counted in one pass, for the report and the dataset card.

Samples are read batch by batch: memory grows with failures, annotations and what is shown, not with media.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra import schema
from infra.secrets import redact
from infra.storage import Storage
from infra.tables import Table
from pipelines.decisions import Decision
from pipelines.run_log import Run, read_runs
from stages import texture
from stages.batch import STOPPED
from stages.early import NAME
from stages.score import MEASURED
from stages.screen import PREFIX

VERDICTS = ("accepted", "rejected")
SPREAD_LIMIT = 100_000
"""Histograms and throughput are drawn from at most this many samples, evenly spread over the table."""

MEDIA_SCORES = frozenset((*MEASURED, *texture.MEASURED, NAME))
"""Scores of ScoreMedia, ScoreTexture and early rejection: a sample with any other was seen by the judge or its screen."""

AFTER_MEDIA = ("decompose", "screen", "judge", "caption", "write")
"""Stages that only samples reach which passed ScoreMedia."""

COUNTED = ("sample_id", "run_id", "verdict", "reasons", "scores", "cost", "created_at")

Split = tuple[np.ndarray, np.ndarray]
"""Values of accepted and of rejected samples, float64."""


@dataclass(frozen=True)
class Failure:
    """One kind of failure: how often, where, and one example."""

    error_type: str
    stage: str
    count: int
    error: str
    prompt: str
    sample_id: str


@dataclass(frozen=True)
class StageCost:
    """What a stage took over all rows."""

    stage: str
    accelerator_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Facts:
    """A dataset's counts, with decisions applied; withdrawn samples count only as `withdrawn` and in what was paid."""

    planned: int
    generated: int
    passed: int
    """Samples that ScoreMedia let through."""
    screened: int
    """Samples with a score that only a screen gives; 0 where there was none."""
    judged: int
    """Samples with a score that only a judge gives; 0 where there was no judge."""
    accepted: int
    rejected: int
    stopped: int
    """Samples that were not worth finishing: neither generated nor failed."""
    withdrawn: int
    failures: tuple[Failure, ...]
    reasons: tuple[tuple[str, int], ...]
    costs: tuple[StageCost, ...]
    accelerator_seconds: float
    """Allocated by runs that ended, and what the rows of the others cost."""
    unended: int
    """Runs whose allocation is not known, because they still run, were killed or broke."""
    runs: tuple[Run, ...]
    scores: Mapping[str, Split]
    """Score name -> its values in the spread."""
    times: Mapping[str, Split]
    """run_id -> created_at of the spread, in epoch seconds."""
    stride: int
    """The spread holds each stride-th sample."""
    positions: Mapping[str, np.ndarray]
    """Verdict -> the rows of `samples` that have it."""

    @property
    def failed(self) -> int:
        return sum(failure.count for failure in self.failures)

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.generated if self.generated else None

    @property
    def accelerator_seconds_per_accepted(self) -> float | None:
        return self.accelerator_seconds / self.accepted if self.accepted else None

    @property
    def overhead(self) -> dict[str, float]:
        """Accelerator-seconds of all runs that went to no sample, by what took them."""
        total: Counter[str] = Counter()
        for run in self.runs:
            total.update(run.overhead)
        return {name: seconds for name, seconds in total.items() if seconds > 0}


class Snapshot:
    """One version of a dataset's tables, opened once so that every pass sees the same rows in the same order."""

    def __init__(self, storage: Storage) -> None:
        self._tables = {name: Table(storage, name).dataset() for name in ("samples", "failures", "runs")}

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The samples, and the row at which each batch starts."""
        start = 0
        for batch in self._tables["samples"].to_batches(columns=list(columns)):
            yield start, batch
            start += len(batch)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All rows of a small table."""
        return self._tables[table].to_table().to_pylist()

    def count(self) -> int:
        """Rows of `samples`."""
        return int(self._tables["samples"].count_rows())

    def take(self, positions: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Position -> the sample at that row."""
        wanted = np.sort(np.asarray(positions, dtype=np.int64))
        rows: dict[int, dict[str, Any]] = {}
        for start, batch in self.batches(columns):
            low, high = np.searchsorted(wanted, (start, start + len(batch)))
            if high > low:
                found = batch.take(pa.array(wanted[low:high] - start)).to_pylist()
                rows.update(zip(wanted[low:high].tolist(), found, strict=True))
        return rows


def read_facts(snapshot: Snapshot, decisions: Mapping[str, Decision]) -> Facts:
    """Count everything."""
    total = snapshot.count()
    runs = read_runs(snapshot.rows("runs"))
    attempts = sorted(snapshot.rows("failures"), key=lambda row: row["attempt"] or 0)
    tally = _Tally(decisions, {row["sample_id"]: row for row in attempts}, stride=max(1, -(-total // SPREAD_LIMIT)))
    for start, batch in snapshot.batches(COUNTED):
        tally.add(start, batch)
    left = list(tally.failed.values())  # a sample that a later attempt made has not failed
    stopped = [row for row in left if row["error_type"] == STOPPED]
    failed = [row for row in left if row["error_type"] != STOPPED]
    for row in attempts:
        tally.add_failure_cost(row)
    ended = {run.run_id: run.allocated for run in runs if run.allocated is not None}
    unended = sum(seconds for run_id, seconds in tally.run_costs.items() if run_id not in ended)
    positions = {verdict: _joined(found) for verdict, found in tally.positions.items()}
    accepted, rejected = (len(positions[verdict]) for verdict in VERDICTS)
    scores, times = tally.spread_out()
    late = sum(row["stage"] in AFTER_MEDIA for row in failed)
    return Facts(
        planned=max([total + len(left), *(run.planned_through for run in runs)]),
        generated=accepted + rejected,
        passed=tally.passed + late,
        screened=tally.screened,
        judged=tally.judged,
        accepted=accepted,
        rejected=rejected,
        stopped=len(stopped),
        withdrawn=tally.withdrawn,
        failures=_group(failed),
        reasons=tuple(tally.reasons.most_common()),
        costs=tuple(StageCost(stage, float(pair[0]), float(pair[1])) for stage, pair in tally.costs.items()),
        accelerator_seconds=sum(ended.values()) + unended,
        unended=len(runs) - len(ended),
        runs=runs,
        scores=scores,
        times=times,
        stride=tally.stride,
        positions=positions,
    )


class _Tally:
    """The running counts of one pass over `samples`."""

    def __init__(self, decisions: Mapping[str, Decision], failed: dict[str, dict[str, Any]], stride: int) -> None:
        self.decisions = decisions
        self.decided = pa.array(list(decisions), pa.string())
        self.failed = failed
        self.stride = stride
        self.withdrawn = self.screened = self.judged = self.passed = 0
        self.positions: dict[str, list[np.ndarray]] = {verdict: [] for verdict in VERDICTS}
        self.reasons: Counter[str] = Counter()
        self.costs: dict[str, np.ndarray] = {}
        self.run_costs: dict[str, float] = {}
        self.spread: list[pa.Table] = []

    def add(self, start: int, batch: pa.RecordBatch) -> None:
        verdicts, hidden, redecided = self._verdicts(batch)
        if self.failed:
            for sample_id in self.failed.keys() & set(batch["sample_id"].to_pylist()):
                del self.failed[sample_id]
        seen = ~hidden
        self.withdrawn += int(hidden.sum())
        for verdict in VERDICTS:
            self.positions[verdict].append(start + np.flatnonzero(seen & (verdicts == verdict)))
        screened, judged = _seen_by(batch["scores"])
        self.screened += int((screened & seen).sum())
        self.judged += int((judged & seen).sum())
        self.passed += int(((screened | judged | (verdicts == "accepted")) & seen).sum())
        rejected = batch.filter(pa.array(seen & ~redecided & (verdicts == "rejected")))
        self.reasons.update(reason_kind(reason) for reason in pc.list_flatten(rejected["reasons"]).to_pylist())
        self._add_costs(batch)
        picked = np.flatnonzero(seen & ((start + np.arange(len(batch))) % self.stride == 0))
        columns = pa.table({name: batch[name] for name in ("run_id", "scores", "created_at")}).take(pa.array(picked))
        self.spread.append(columns.append_column("verdict", pa.array(verdicts[picked], pa.string())))

    def _verdicts(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The verdict that holds for each row, whether it is withdrawn, and whether an annotation decided it."""
        verdicts = np.array(batch["verdict"].to_pylist(), dtype=object)
        hidden = np.zeros(len(batch), dtype=bool)
        redecided = np.zeros(len(batch), dtype=bool)
        for row in np.flatnonzero(pc.is_in(batch["sample_id"], self.decided).to_numpy(zero_copy_only=False)):
            decision = self.decisions[batch["sample_id"][int(row)].as_py()]
            hidden[row] = decision.withdrawn
            if decision.verdict:
                verdicts[row], redecided[row] = decision.verdict, True
                if not decision.withdrawn:
                    self.reasons.update(map(reason_kind, decision.reasons))
        return verdicts, hidden, redecided

    def _add_costs(self, batch: pa.RecordBatch) -> None:
        flat = pc.list_flatten(batch["cost"])
        owners = batch["run_id"].take(pc.list_parent_indices(batch["cost"]))
        table = pa.table({"run_id": owners, **{name: pc.struct_field(flat, name) for name in schema.COST.names}})
        sums = table.group_by(["run_id", "stage"]).aggregate([("accelerator_seconds", "sum"), ("cpu_seconds", "sum")])
        for row in sums.to_pylist():
            self._add_cost(row["run_id"], row["stage"], row["accelerator_seconds_sum"], row["cpu_seconds_sum"])

    def add_failure_cost(self, row: dict[str, Any]) -> None:
        for cost in row["cost"] or ():
            self._add_cost(row["run_id"], cost["stage"], cost["accelerator_seconds"], cost["cpu_seconds"])

    def _add_cost(self, run_id: str, stage: str | None, accelerator: float | None, cpu: float | None) -> None:
        self.costs.setdefault(stage or "other", np.zeros(2))
        self.costs[stage or "other"] += (accelerator or 0.0, cpu or 0.0)
        self.run_costs[run_id] = self.run_costs.get(run_id, 0.0) + (accelerator or 0.0)

    def spread_out(self) -> tuple[dict[str, Split], dict[str, Split]]:
        """Scores by name and times by run, of the samples of the spread."""
        if not self.spread:
            return {}, {}
        table = pa.concat_tables(self.spread)
        flat = pc.list_flatten(table["scores"])
        scores = pa.table(
            {
                "name": pc.struct_field(flat, "name"),
                "value": pc.struct_field(flat, "value"),
                "verdict": table["verdict"].take(pc.list_parent_indices(table["scores"])),
            }
        )
        seconds = pc.divide(table["created_at"].cast(pa.int64()).cast(pa.float64()), 1e6)
        times = table.drop_columns("scores").append_column("value", seconds)
        return _by_verdict(scores, "name"), _by_verdict(times, "run_id")


def reason_kind(reason: str) -> str:
    """A reason without what differs from sample to sample: 'motion 0.02 < 0.1' is 'motion < 0.1'."""
    head = reason.partition(":")[0]
    if head.startswith("duplicate of "):
        return "duplicate"
    words = head.split()
    measured = next((at for at, word in enumerate(words) if _is_number(word)), len(words))
    return " ".join(words[:measured] + words[measured + 1 :]) or reason


def _seen_by(scores: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Which samples have a score of the screen, and which one of the judge, bool [n]."""
    names = pc.struct_field(pc.list_flatten(scores), "name")
    owners = pc.list_parent_indices(scores)
    by_screen = pc.starts_with(names, PREFIX)
    by_judge = pc.invert(pc.or_(by_screen, pc.is_in(names, pa.array(sorted(MEDIA_SCORES), pa.string()))))
    found = []
    for mine in (by_screen, by_judge):
        flags = np.zeros(len(scores), dtype=bool)
        flags[owners.filter(mine).to_numpy(zero_copy_only=False)] = True
        found.append(flags)
    return found[0], found[1]


def _by_verdict(table: pa.Table, key: str) -> dict[str, Split]:
    found = {}
    for name in pc.unique(table[key]).to_pylist():
        mine = table.filter(pc.equal(table[key], name))
        sides = [mine.filter(pc.equal(mine["verdict"], verdict))["value"].to_numpy() for verdict in VERDICTS]
        accepted, rejected = (values[np.isfinite(values)] for values in sides)
        found[name] = (accepted, rejected)
    return found


def _group(rows: Iterable[dict[str, Any]]) -> tuple[Failure, ...]:
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row["error_type"] or "unknown", row["stage"] or ""), []).append(row)
    found = [
        Failure(
            error_type=error_type,
            stage=stage,
            count=len(group),
            error=redact(group[0]["error"] or ""),
            prompt=group[0]["prompt"] or "",
            sample_id=group[0]["sample_id"] or "",
        )
        for (error_type, stage), group in kinds.items()
    ]
    return tuple(sorted(found, key=lambda failure: (-failure.count, failure.error_type)))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
