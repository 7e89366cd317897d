"""Prompts before samples: read the records, expand them, commit their text, and write the run's plan file."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.schema import PROMPTS
from infra.tables import Table
from pipelines.dedup import Exclusions, RecordReport
from pipelines.enumeration import PLANNED
from pipelines.feed import Feeder
from pipelines.graph import results
from pipelines.idset import IdSet
from pipelines.indexing import commit_clips
from pipelines.placement import Group, in_flight
from pipelines.planned_prompts import write_plan
from pipelines.records import PromptRecord, expand_rows, resolve_prompts, unique_records, variant_ids
from pipelines.resolve import Resolved
from stages.batch import Batch, WorldFault, load_json, texts

CHUNK = 8192
EXPAND_BATCH = 64

Row = dict[str, Any]


def commit_prompts(run: Resolved, groups: Callable[[], tuple[Group, ...]], report: RecordReport) -> str:
    """Commit the prompts of a run that the dataset lacks, and return the name of its plan file.

    An expansion is committed before any sample of it is planned, and read back: of two runs that expand one record, both
    use the text whose commit was first.
    """
    if run.spec.recipe == "curate":
        return commit_clips(run, groups, report)
    if run.expander is None:
        return write_plan(run, _commit_plain(run, report))
    records = list(unique_records(run.spec, report))
    if not records:
        raise _no_prompts(report)
    _commit_expansions(run, records, groups, report)
    return write_plan(run, _read_back(run, records))


def _commit_plain(run: Resolved, report: RecordReport) -> Iterator[pa.Table]:
    """The run's rows, in order, each chunk committed before it is handed on."""
    table = Table(run.storage, "prompts")
    committer = Committer(table, run.run_id)
    known = IdSet(batch.column("prompt_id") for batch in table.batches(["prompt_id"]))
    rows = resolve_prompts(run.spec, report)
    found = False
    for number in itertools.count():
        chunk = list(itertools.islice(rows, CHUNK))
        if not chunk:
            break
        found = True
        new = ~known.contains([row["prompt_id"] for row in chunk])
        _commit_rows(run, committer, [row for row, is_new in zip(chunk, new, strict=True) if is_new], number)
        yield pa.Table.from_pylist(chunk, PLANNED)
    if not found:
        raise _no_prompts(report)


def _commit_expansions(
    run: Resolved, records: list[PromptRecord], groups: Callable[[], tuple[Group, ...]], report: RecordReport
) -> None:
    expand, expander = run.spec.prompts.expand, run.expander
    assert expand is not None and expander is not None
    table = Table(run.storage, "prompts")
    committer = Committer(table, run.run_id)
    known = IdSet(batch.column("prompt_id") for batch in table.batches(["prompt_id"]))
    missing = [
        record for record in records if not known.contains(variant_ids(record, expand, expander.fingerprint)).all()
    ]
    if not missing:
        return
    exclusions = Exclusions.read(run.spec.prompts, run.spec.output.storage)
    made = groups()
    feeder = Feeder(in_flight(made))
    batches = (missing[at : at + EXPAND_BATCH] for at in range(0, len(missing), EXPAND_BATCH))
    waiting: dict[int, list[PromptRecord]] = {}

    def feed() -> None:
        while feeder.has_room:
            chunk = next(batches, None)
            if chunk is None:
                feeder.close()
                return
            waiting[feeder.launched] = chunk
            feeder.put(_record_batch(chunk))

    with closing(results(feeder, made, {"run_id": run.run_id}, time.time())) as out:
        for batch in out:
            if "fault" in batch:
                kind, _, message = str(batch["fault"][0]).partition(": ")
                raise UserError(message) if kind == "user" else WorldFault(message)
            if batch and feeder.done(number := int(batch["batch_index"][0])):
                rows: list[Row] = []
                for record, answer in zip(waiting.pop(number), load_json(batch["expansions"]), strict=True):
                    answers = _allowed(record, answer, expand.variants, exclusions, report)
                    rows += expand_rows(record, answers, expander.fingerprint, expand.keep_original)
                new = ~known.contains([row["prompt_id"] for row in rows])
                _commit_rows(run, committer, [row for row, is_new in zip(rows, new, strict=True) if is_new], number)
            feed()
    if feeder.unfinished():
        raise WorldFault("prompts.expand: the language model's worker died on the same records each time")


def _allowed(
    record: PromptRecord, answers: list[str], variants: int, exclusions: Exclusions, report: RecordReport
) -> list[str]:
    """The expansions; where there is none, or one that `prompts.exclude` keeps out, the record's own prompt stands in."""
    allowed = []
    for text in answers or [record.prompt] * variants:
        excluded = exclusions.match(text)
        if excluded is not None:
            report.excluded += 1
            report.example("excluded", text, excluded)
        allowed.append(text if excluded is None else record.prompt)
    return allowed


def _record_batch(records: list[PromptRecord]) -> Batch:
    count = len(records)
    blank = [""] * count
    return {
        "sample_id": texts([record.prompt_id() for record in records]),
        "prompt": texts([record.prompt for record in records]),
        "batch_index": np.zeros(count, np.int64),
        "error_type": texts(blank),
        "error": texts(blank),
        "error_stage": texts(blank),
    }


def _read_back(run: Resolved, records: list[PromptRecord]) -> Iterator[pa.Table]:
    """The committed rows of `records`, in their order."""
    assert run.expander is not None
    table = Table(run.storage, "prompts")
    for at in range(0, len(records), CHUNK):
        wanted = [
            prompt_id
            for record in records[at : at + CHUNK]
            for prompt_id in variant_ids(record, run.spec.prompts.expand, run.expander.fingerprint)
        ]
        found = table.read(PLANNED.names, pc.field("prompt_id").isin(wanted))
        place = {prompt_id: row for row, prompt_id in enumerate(found["prompt_id"].to_pylist())}
        yield found.take([place[prompt_id] for prompt_id in wanted]).cast(PLANNED)


def _commit_rows(run: Resolved, committer: Committer, rows: list[Row], number: int) -> None:
    if not rows:
        return
    now = datetime.now(UTC)
    table = pa.Table.from_pylist([{**row, "run_id": run.run_id, "created_at": now} for row in rows], PROMPTS)
    committer.commit([write_part(run.storage, f"prompts/{run.run_id}-{number:08d}.parquet", table)])


def _no_prompts(report: RecordReport) -> UserError:
    return UserError(
        f"prompts: no prompt is left to generate from ({json.dumps(report.as_dict(), default=str)[:200]}); add some"
    )
