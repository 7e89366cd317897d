"""Clips before samples: list the sources, find the clips in each file, commit them to `prompts`, and write the plan file.

The table `sources` is the ledger: one row a file, once what it holds is in `prompts` and what is wrong with it in `failures`.
A run that goes on after a kill lists again and opens only files without a row; once a listing was indexed whole, `runs` has
an event that says so, and nothing is listed again before all its clips are done.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.schema import FAILURES, PROMPTS, SOURCES
from infra.tables import Table
from pipelines.dedup import RecordReport
from pipelines.enumeration import PLANNED
from pipelines.feed import Feeder
from pipelines.graph import results
from pipelines.identity import Shape, clip_id, source_id
from pipelines.idset import IdSet
from pipelines.listing import EVENT, index_of, listing_of, unfinished
from pipelines.placement import Group, in_flight
from pipelines.planned_prompts import write_plan
from pipelines.resolve import Resolved
from pipelines.run_rows import commit_run_row
from pipelines.sources import list_items
from pipelines.sources.item import Item
from stages.batch import Batch, WorldFault, jsons, load_json, texts
from stages.cut import CutDetector
from stages.index import UNREACHABLE, IndexSources
from stages.look import CUT_FROM
from stages.probe import Limits

BATCH = 8
"""Files that an actor takes at a time."""
COMMIT_ROWS = 1024

Row = dict[str, Any]


def indexing_of(run: Resolved) -> IndexSources:
    """The stage that indexes."""
    cut, clip = run.spec.cut, run.spec.clip
    return IndexSources(
        storage=run.storage,
        detector=None if cut.detector == "none" else CutDetector(cut.detector, cut.threshold),
        shortest=cut.shortest,
        longest=cut.longest,
        limits=Limits(cut.max_bytes, cut.max_pixels, cut.max_seconds),
        crop=clip.crop,
        fps=clip.fps,
        max_side=clip.max_side,
    )


def commit_clips(run: Resolved, groups: Callable[[], tuple[Group, ...]], report: RecordReport) -> str:
    """Commit the clips of a run that the dataset lacks, and return the name of its plan file."""
    if (known := unfinished(run.storage, run.spec)) is not None:
        report.read, report.kept, report.bad = known["read"], known["kept"], known["bad"]
        return str(known["plan_file"])
    listed = _Indexing(run, report).run(groups)
    plan_file = write_plan(run, planned(run, listed, report))
    if not report.kept:
        raise UserError(f"sources: no clip is left of {report.read} files ({report.bad} of them bad); see failures/")
    said = {"listing": listing_of(run.spec), "read": report.read, "kept": report.kept, "bad": report.bad}
    commit_run_row(run, EVENT, plan_file=plan_file, planned=report.kept, extra_json=json.dumps(said))
    return plan_file


class _Indexing:
    """State of one run's indexing."""

    def __init__(self, run: Resolved, report: RecordReport) -> None:
        self.run_, self.report, self.index = run, report, index_of(run.spec)
        self.tables = {name: Table(run.storage, name) for name in ("prompts", "failures", "sources")}
        # Opened before the tables are read.
        self.committers = {name: Committer(table, run.run_id) for name, table in self.tables.items()}
        self.known = IdSet(batch.column("source_id") for batch in self.tables["sources"].batches(["source_id"]))
        self.clips = IdSet(batch.column("prompt_id") for batch in self.tables["prompts"].batches(["prompt_id"]))
        self.new_clips: set[str] = set()
        self.listed: list[pa.Array] = []
        self.waiting = _Waiting()
        self.parts = 0

    def run(self, groups: Callable[[], tuple[Group, ...]]) -> IdSet:
        """Index all that is listed and has no row; the ids of what is listed."""
        batches = self._batches()
        first = next(batches, None)
        if first is not None:
            made = groups()
            lost = self._drive(itertools.chain([first], batches), made, in_flight(made))
            singles = ([item] for batch in lost for item in batch)
            for (died,) in self._drive(singles, made, 1) if lost else ():
                said = "the worker process died each time it had this file (out of memory, or a crash)"
                self._take(died, {}, "worker_died", said)
            self._commit()
        return IdSet(self.listed)

    def _batches(self) -> Iterator[list[Item]]:
        """Files that have no row yet, some at a time; notes all that are listed."""
        items = list_items(self.run_.spec)
        waiting: list[Item] = []
        while chunk := list(itertools.islice(items, 1024)):
            ids = [source_id(item.uri, self.index) for item in chunk]
            self.report.read += len(chunk)
            self.listed.append(pa.array(ids, pa.string()))
            waiting += [item for item, done in zip(chunk, self.known.contains(ids), strict=True) if not done]
            while len(waiting) >= BATCH:
                yield waiting[:BATCH]
                waiting = waiting[BATCH:]
        if waiting:
            yield waiting

    def _drive(self, batches: Iterator[list[Item]], groups: tuple[Group, ...], at_once: int) -> list[list[Item]]:
        """Take batches through the graph; those that did not come out."""
        feeder, waiting = Feeder(at_once), dict[int, list[Item]]()

        def feed() -> None:
            while feeder.has_room:
                batch = next(batches, None)
                if batch is None:
                    feeder.close()
                    return
                waiting[feeder.launched] = batch
                feeder.put(self._columns(batch))

        with closing(results(feeder, groups, {"run_id": self.run_.run_id}, time.time())) as out:
            for batch in out:
                if "fault" in batch:
                    kind, _, message = str(batch["fault"][0]).partition(": ")
                    raise UserError(message) if kind == "user" else WorldFault(message)
                if batch and feeder.done(number := int(batch["batch_index"][0])):
                    found = zip(load_json(batch["index"]), batch["error_type"], batch["error"], strict=True)
                    for item, (said, kind, error) in zip(waiting.pop(number), found, strict=True):
                        self._take(item, said or {}, str(kind), str(error))
                    if self.waiting.is_due(self.run_.spec.output.commit_every):
                        self._commit()
                feed()
        return list(waiting.values())

    def _columns(self, items: list[Item]) -> Batch:
        blank = [""] * len(items)
        told = ("uri", "caption", "sidecars", "caption_key", "error")
        return {
            "sample_id": texts([source_id(item.uri, self.index) for item in items]),
            "source": jsons([{name: getattr(item, name) for name in told} for item in items]),
            "index": texts(blank),
            "batch_index": np.zeros(len(items), np.int64),
            "error_type": texts(blank),
            "error": texts(blank),
            "error_stage": texts(blank),
        }

    def _take(self, item: Item, said: Row, error_type: str, error: str) -> None:
        """Note what became of a file, to be committed."""
        rows = [_clip_row(item, said, clip) for clip in said.get("clips", ())]
        ids = [row["prompt_id"] for row in rows]
        for row, known in zip(rows, self.clips.contains(ids), strict=True):
            if known or row["prompt_id"] in self.new_clips:
                self.report.identical += 1
                self.report.example("identical", item.uri, row["inputs"][0]["sha256"])
                continue
            self.new_clips.add(row["prompt_id"])
            self.waiting.prompts.append(row)
        mine = source_id(item.uri, self.index)
        if error_type:
            self.report.bad += 1
            self.waiting.failures.append(_failure_row(mine, item, error_type, error))
        if error_type != UNREACHABLE:
            self.waiting.sources.append(_source_row(mine, self.index, item, said, ids, error_type, error))

    def _commit(self) -> None:
        """Clips, then failures, then the files' rows: a file that has a row has all that belongs to it."""
        stamp = {"run_id": self.run_.run_id, "created_at": datetime.now(UTC)}
        held = {"prompts": self.waiting.prompts, "failures": self.waiting.failures, "sources": self.waiting.sources}
        for name, rows in held.items():
            if rows:
                schema = {"prompts": PROMPTS, "failures": FAILURES, "sources": SOURCES}[name]
                table = pa.Table.from_pylist([{**row, **stamp} for row in rows], schema)
                path = f"{name}/{self.run_.run_id}-index-{self.parts:08d}.parquet"
                self.committers[name].commit([write_part(self.run_.storage, path, table)])
        self.waiting = _Waiting()
        self.parts += 1


@dataclass
class _Waiting:
    """Rows that wait for a transaction."""

    prompts: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def is_due(self, every: float) -> bool:
        return max(len(self.prompts), len(self.sources)) >= COMMIT_ROWS or time.monotonic() - self.since >= every


def _clip_row(item: Item, said: Row, clip: Row) -> Row:
    shape = Shape(clip["height"], clip["width"], clip["num_frames"], clip["fps"])
    told = {key: said["probe"][key] for key in ("codec", "width", "height", "fps", "seconds")}
    told["turned"] = bool(said["probe"]["rotation"] or said["probe"]["mirrored"])
    extra = {**item.extra, CUT_FROM: {**told, "nbytes": said["nbytes"], "crop": clip["crop"]}}
    place = {"uri": item.uri, "sha256": said["sha256"], "start": clip["start"], "end": clip["end"]}
    return {
        "prompt_id": clip_id(said["sha256"], clip["start"], clip["end"], shape),
        "source_prompt": said["caption"],
        "prompt": said["caption"],
        "negative_prompt": "",
        "variant": 0,
        "expander": "",
        "inputs": [{"role": said["kind"], **place}],
        **asdict(shape),
        "seed": 0,
        "tags": list(item.tags),
        "licence": item.licence,
        "extra_json": json.dumps(extra, ensure_ascii=False),
    }


def _source_row(mine: str, index: str, item: Item, said: Row, ids: list[str], error_type: str, error: str) -> Row:
    return {
        "source_id": mine,
        "index": index,
        "uri": item.uri,
        "kind": said.get("kind", ""),
        "sha256": said.get("sha256", ""),
        "nbytes": said.get("nbytes"),
        "seconds": said.get("seconds"),
        "prompt_ids": ids,
        "dropped": said.get("dropped", []),
        "error_type": error_type,
        "error": error,
        "extra_json": json.dumps({"probe": said["probe"]}) if "probe" in said else "",
    }


def _failure_row(mine: str, item: Item, error_type: str, error: str) -> Row:
    return {
        "sample_id": mine,
        "attempt": 1,
        "prompt_id": "",
        "prompt": item.caption,
        "sample_index": 0,
        "stage": IndexSources.name,
        "error_type": error_type,
        "error": error or item.uri,
        "cost": [],
        "node": socket.gethostname(),
    }


def planned(run: Resolved, listed: IdSet, report: RecordReport) -> Iterator[pa.Table]:
    """Clips of all files that are listed, in the order in which they were committed."""
    columns: list[pa.Array] = []
    for batch in Table(run.storage, "sources").batches(["source_id", "prompt_ids"]):
        mine = batch.filter(pa.array(listed.contains(batch.column("source_id").to_pylist())))
        columns.append(mine.column("prompt_ids").flatten())
    wanted = IdSet(columns)
    table = Table(run.storage, "prompts")
    for path in sorted(table.files()):
        for batch in table.dataset([path]).to_batches(columns=PLANNED.names):
            rows = batch.filter(pa.array(wanted.contains(batch.column("prompt_id").to_pylist())))
            report.kept += rows.num_rows
            yield pa.Table.from_batches([rows]).cast(PLANNED)
