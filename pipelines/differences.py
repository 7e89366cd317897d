"""What a run would add to its dataset, and what differs from the run before: said before anything is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.tables import Table, dataset_exists
from pipelines.commits import failures, retried
from pipelines.decisions import count_accepted
from pipelines.dedup import RecordReport
from pipelines.enumeration import Enumeration
from pipelines.identity import sample_ids
from pipelines.idset import IdSet
from pipelines.listing import unfinished
from pipelines.records import unique_records, variant_ids
from pipelines.resolve import Resolved

CHUNK = 8192

OPERATION = ("output.storage", "guards", "schedule", "notify")
"""Sections that change no sample."""
DECISIONS = {
    "judge": "--judge",
    "score": "",
    "caption": "--caption",
}
"""Sections whose change does not make another sample, and how they reach the samples that exist."""


@dataclass(frozen=True)
class Change:
    """A key of the spec that differs from the last run's."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Difference:
    """What is planned against what is there. `new` counts planned samples that are neither rows nor failures; of these
    `stopped` were stopped early, and `failed` are the others."""

    exists: bool
    planned: int
    new: int
    failed: int
    stopped: int
    accepted: int
    rows: int
    changes: tuple[Change, ...]
    target_reached: bool
    unlisted: bool = False
    """Recipe curate: its sources are listed, and their clips counted, by the run."""

    @property
    def nothing_to_do(self) -> bool:
        return self.exists and (self.target_reached or (self.new == 0 and not self.unlisted))

    def lines(self, dataset: str) -> list[str]:
        """What to tell the user."""
        if not self.exists:
            planned = "clips of sources that the run will list" if self.unlisted else f"{self.planned} samples planned"
            return [f"new dataset {dataset}: {planned}"]
        if self.unlisted and not self.target_reached:
            first = f"{dataset} has {self.rows} samples: the run will list its sources, and take what is new"
        elif self.target_reached:
            first = f"{dataset} has {self.rows} samples, {self.accepted} accepted: the target is reached, nothing to generate"
        elif self.new == 0:
            first = f"{dataset} has all {self.planned} planned samples: nothing to generate"
        else:
            first = f"{dataset} has {self.rows} samples: {self.new} new samples to generate of {self.planned} planned"
        said = [first]
        if self.failed:
            said.append(f"{self.failed} planned samples failed before: --retry-failed tries them again")
        if self.stopped:
            said.append(f"{self.stopped} planned samples were stopped early: --retry-early finishes them")
        for change in self.changes:
            said.append(
                f"changed: {change.key}: {_short(change.before)} -> {_short(change.after)}{self._effect(change)}"
            )
        return said

    def _effect(self, change: Change) -> str:
        section = change.key.split(".", 1)[0]
        if section not in DECISIONS or not self.rows:
            return ""
        flag = DECISIONS[section]
        how = f"apply it to them with `ditmill annotate SPEC {flag}`" if flag else "they keep their scores and verdicts"
        return f" (not applied to the {self.rows} samples that exist: {how})"


def difference(run: Resolved, report: RecordReport | None = None) -> Difference:
    """Count what `run` would generate. Reads the prompts and the tables, writes nothing."""
    exists = dataset_exists(run.storage)
    rows = run.spec.schedule.rows(run.storage)
    samples = Table(run.storage, "samples")
    done = IdSet(batch.column("sample_id") for batch in samples.batches(["sample_id"], rows))
    tried, _ = failures(run.storage, rows)
    early, _ = failures(run.storage, rows, retried(failed=True, early=False))
    planned = new = failed = stopped = 0
    limit = run.spec.target.samples
    curated = run.spec.recipe == "curate"
    indexed = unfinished(run.storage, run.spec) if curated and exists else None
    report = report if report is not None else RecordReport()
    for ids in _indexed_ids(run, indexed, report) if curated else _planned_ids(run, report):
        if limit is not None:
            ids = ids[: limit - planned]
        made = done.contains(ids)
        broken = tried.contains(ids) & ~made
        given_up = early.contains(ids) & broken
        planned += len(ids)
        failed += int((broken & ~given_up).sum())
        stopped += int(given_up.sum())
        new += int(np.count_nonzero(~(made | broken)))
        if limit is not None and planned >= limit:
            break
    accepted = count_accepted(run.storage, rows)
    wanted = run.spec.target.accepted
    return Difference(
        exists=exists,
        planned=planned,
        new=new,
        failed=failed,
        stopped=stopped,
        accepted=accepted,
        rows=len(done),
        changes=tuple(_changes(run)) if exists else (),
        target_reached=wanted is not None and accepted >= wanted,
        unlisted=curated and indexed is None,
    )


def _planned_ids(run: Resolved, report: RecordReport) -> Iterator[list[str]]:
    """The ids of all planned samples, without expanding anything; in enumeration order where that matters (a limit)."""
    expand = run.spec.prompts.expand
    fingerprint = run.expander.fingerprint if run.expander else ""
    prompt_ids = [
        pid for record in unique_records(run.spec, report) for pid in variant_ids(record, expand, fingerprint)
    ]
    for index in range(run.spec.samples_per_prompt):
        for at in range(0, len(prompt_ids), CHUNK):
            for generator in run.generator_ids:
                yield sample_ids(prompt_ids[at : at + CHUNK], index, generator, run.plan_id)


def _indexed_ids(run: Resolved, indexed: dict[str, Any] | None, report: RecordReport) -> Iterator[list[str]]:
    """The ids of the clips that an earlier run indexed and did not get through."""
    if indexed is None:
        return
    report.read, report.kept, report.bad = indexed["read"], indexed["kept"], indexed["bad"]
    plan = Enumeration(run.storage, indexed["plan_file"], 1, run.generator_ids, run.plan_id)
    for chunk in plan.chunks():
        yield chunk.sample_ids


def _changes(run: Resolved) -> Iterator[Change]:
    """Keys that differ from the spec of the newest run."""
    rows = Table(run.storage, "runs").read(["spec_json", "created_at"])
    if rows.num_rows == 0:
        return
    newest = max(rows.to_pylist(), key=lambda row: row["created_at"])
    before, after = _flat(json.loads(newest["spec_json"])), _flat(json.loads(run.spec.model_dump_json()))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(OPERATION):
            yield Change(key, before.get(key), after.get(key))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        items = [(str(at), item) for at, item in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
