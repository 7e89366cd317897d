"""Judging and captioning stored samples: what needs no model at once, the rest through the graph, committed as it goes."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from infra.commit import Committer, Part
from infra.control import Pulse, beating, sweep
from infra.errors import UserError
from infra.ray_session import Cluster
from infra.tables import Table
from infra.telemetry import log
from pipelines.annotate import Annotated, Scope
from pipelines.answers import SCORE, Answers, asked
from pipelines.decisions import NONE, Decision, read_decisions
from pipelines.feed import Feeder
from pipelines.generate import StopRequest
from pipelines.graph import results
from pipelines.ledger import Ledger
from pipelines.placement import in_flight, place_stored
from pipelines.resolve import Resolved
from pipelines.run import clean_up
from pipelines.run_rows import commit_run_row
from pipelines.stored import COLUMNS, StoredBatches
from stages.annotate import Annotator, Row, WriteAnnotations
from stages.batch import Batch, Stage, WorldFault, size
from stages.decode import DecodeLatents
from stages.judge import JudgeQuality
from stages.read import DecodeStored, ReadMedia
from stages.rubric import parts_of
from stages.score import ScoreMedia

PART_ROWS = 20_000
SHOWN = 3


class Work(Protocol):
    """What is to be said of samples: who says it, what can be said without a model, and the stages for the rest."""

    kind: str
    annotator: Annotator
    columns: tuple[str, ...]

    def __init__(self, run: Resolved) -> None: ...

    def stages(self) -> tuple[Stage, ...]: ...

    def wants(self, row: dict[str, Any], decision: Decision, scope: Scope) -> bool: ...

    def without_model(self, row: dict[str, Any], decision: Decision) -> list[Row] | None:
        """Annotations of a sample, none where nothing new is to be said; None where a model must look at it."""


class Judging:
    """Verdicts by the bounds of the spec's `score`, then by its judge."""

    kind: str = "judge"
    columns: tuple[str, ...] = (
        "verdict",
        "reasons",
        "judge",
        "rubric",
        "scores",
        "negative_prompt",
        "tags",
        "extra_json",
    )

    def __init__(self, run: Resolved) -> None:
        self.annotator = Annotator(run.storage, run.run_id, run.judge_name or SCORE, run.rubric_id, run.asked)
        score, *self._stages = run.scoring()
        assert isinstance(score, ScoreMedia)
        self._score = score
        self._answers = Answers(run)

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stages)

    def wants(self, row: dict[str, Any], decision: Decision, scope: Scope) -> bool:
        if scope == "missing":
            raise UserError("scope: expected all, accepted or rejected for the judge, found missing")
        return scope == "all" or (decision.verdict or row["verdict"]) == scope

    def without_model(self, row: dict[str, Any], decision: Decision) -> list[Row] | None:
        reasons = self._of_media(row)
        if not reasons and self._stages:
            *_, judge = self._stages
            assert isinstance(judge, JudgeQuality)
            answers = self._answers.of(row)
            parts = parts_of(row["negative_prompt"] or "", row["tags"] or (), json.loads(row["extra_json"] or "{}"))
            settled = judge.settle(answers, row["num_frames"], parts)
            if settled is None:
                return None
            _, reasons = settled
        verdict = "rejected" if reasons else "accepted"
        if decision.verdict:
            known = (decision.verdict, list(decision.reasons), decision.decided_by, decision.rubric.rpartition("+")[0])
        else:
            known = (row["verdict"], list(row["reasons"] or ()), row["judge"] or SCORE, asked(row))
        if known == (verdict, reasons, self.annotator.name, self.annotator.asked):
            return []
        return self.annotator.verdict(row["sample_id"], verdict, reasons)

    def _of_media(self, row: dict[str, Any]) -> list[str]:
        """Why ScoreMedia would reject the sample now. Duplicates are known only where they were found before."""
        measured: dict[str, float] = {}
        for item in row["scores"] or ():
            measured.setdefault(item["name"], item["value"])
        reasons = self._score.reasons(measured)
        if not reasons and self._score.reject_duplicates:
            reasons = [reason for reason in row["reasons"] or () if reason.startswith("duplicate of ")]
        return reasons


class Captioning:
    """Captions by the spec's captioner."""

    kind: str = "caption"
    columns: tuple[str, ...] = ("verdict", "captions")

    def __init__(self, run: Resolved) -> None:
        caption = run.spec.caption
        assert caption is not None and run.captioner is not None
        self._styles = caption.styles
        self.annotator = Annotator(run.storage, run.run_id, run.captioner_name, run.captions_id)
        self._stages = run.captioning()

    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def wants(self, row: dict[str, Any], decision: Decision, scope: Scope) -> bool:
        verdict = decision.verdict or row["verdict"]
        if scope == "missing":
            styles = {item["style"] for item in row["captions"] or ()} | set(decision.captions)
            return verdict == "accepted" and not styles.issuperset(self._styles)
        return scope in ("all", verdict)

    def without_model(self, row: dict[str, Any], decision: Decision) -> list[Row] | None:
        mine = (self.annotator.name, self.annotator.rubric)
        return [] if all(decision.captioned_by.get(style) == mine for style in self._styles) else None


@dataclass
class _Tally:
    samples: int = 0
    accepted: int = 0
    rejected: int = 0
    unchanged: int = 0
    skipped: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)


def annotate_stored(
    run: Resolved,
    cluster: Callable[[], Cluster],
    work: Callable[[Resolved], Work],
    scope: Scope,
    stop: StopRequest | None = None,
) -> Annotated:
    """Say what `work` says of the stored samples in `scope`, as a run of its own (see pipelines.annotate)."""
    run = run.again()
    job = _Job(run, stop or StopRequest())
    pulse = Pulse(run.storage, run.run_id)
    try:
        with beating(pulse, "annotating", lambda: asdict(job.tally), lambda: job.stop.set("stopped")):
            job.say(work(run), scope, cluster)
    except BaseException:
        with contextlib.suppress(Exception):
            sweep(run.storage, run.run_id)
        raise
    clean_up(run)
    tally = asdict(job.tally)
    errors = tuple(tally.pop("errors"))
    return Annotated(job.kind, run.run_id, job.annotator, **tally, errors=errors, status=job.stop.reason or "done")


class _Job:
    """State of one annotating run."""

    def __init__(self, run: Resolved, stop: StopRequest) -> None:
        self.run, self.stop = run, stop
        self.tally = _Tally()
        self.kind = self.annotator = ""
        # Opened before the annotations are read and before a part is written.
        self._committer = Committer(Table(run.storage, "annotations"), run.run_id)
        self._waiting: list[Part] = []
        self._rows: list[Row] = []
        self._parts = 0
        self._last = time.monotonic()
        self._ledger = Ledger()
        self._spent: dict[str, Any] = {"allocated_accelerator_seconds": 0.0}
        self._begun = False

    def say(self, work: Work, scope: Scope, cluster: Callable[[], Cluster]) -> None:
        self.kind, self.annotator = work.kind, work.annotator.name
        try:
            batches = self._batches(work, scope)
            first = next(batches, None)
            if first is not None:
                self._begin()
                self._drive(first, batches, work, cluster)
            self._write(work.annotator)
            self._commit(force=True)
        except BaseException as error:
            # What is written and whole is not lost.
            with contextlib.suppress(OSError, TimeoutError):
                self._commit(force=True)
            self._end("failed", {"error": str(error)[:2000]})
            raise
        self._end(self.stop.reason or "exhausted", {})

    def _batches(self, work: Work, scope: Scope) -> Iterator[Batch]:
        """Batches of the samples that a model must look at. What needs none is said on the way."""
        decisions = read_decisions(self.run.storage)
        stored = StoredBatches(self.run)
        columns = list(dict.fromkeys((*COLUMNS, *work.columns)))
        for chunk in Table(self.run.storage, "samples").batches(columns):
            for row in chunk.to_pylist():
                if self.stop.reason:
                    return
                decision = decisions.get(row["sample_id"], NONE)
                if decision.withdrawn or not work.wants(row, decision, scope):
                    continue
                said = work.without_model(row, decision)
                if said is not None:
                    self._say_now(work.annotator, said)
                elif (source := stored.source(row)) is None:
                    self.tally.skipped += 1
                elif (batch := stored.add(row, source)) is not None:
                    yield batch
        yield from stored.rest()

    def _say_now(self, annotator: Annotator, rows: list[Row]) -> None:
        if not rows:
            self.tally.unchanged += 1
            return
        self.tally.samples += 1
        self.tally.accepted += rows[0]["value"] == "accepted"
        self.tally.rejected += rows[0]["value"] == "rejected"
        self._rows += rows
        if len(self._rows) >= PART_ROWS:
            self._write(annotator)
            self._commit()

    def _write(self, annotator: Annotator) -> None:
        if self._rows:
            self._begin()
            self._waiting.append(annotator.write(self._rows, self._parts))
            self._parts += 1
            self._rows = []

    def _drive(self, first: Batch, rest: Iterator[Batch], work: Work, cluster: Callable[[], Cluster]) -> None:
        """Take batches through the graph."""
        run, started = self.run, time.time()
        layout = run.spec.layout
        decoder = DecodeLatents(run.generators, run.plan, layout.batch_size, layout.threads)
        stages = (DecodeStored(decoder), *work.stages(), WriteAnnotations(work.annotator))
        groups = place_stored(ReadMedia(run.storage), stages, cluster(), run.spec.compute)
        feeder = Feeder(in_flight(groups))
        batches = itertools.chain([first], rest)

        def feed() -> None:
            while feeder.has_room:
                batch = None if self.stop.reason else next(batches, None)
                if batch is None:
                    feeder.close()
                    return
                feeder.put(batch)

        try:
            with contextlib.closing(results(feeder, groups, {"run_id": run.run_id}, started)) as out:
                for batch in out:
                    self._take(feeder, batch)
                    self._commit()
                    feed()
        finally:
            feeder.close()
        for batch in feeder.unfinished():
            self.tally.failed += size(batch)
            self.tally.errors.append(
                f"{batch['sample_id'][0]} and its batch: the worker process died each time it had them"
            )
        self._end_ledger(time.time())

    def _take(self, feeder: Feeder, batch: Batch) -> None:
        if "fault" in batch:
            kind, _, message = str(batch["fault"][0]).partition(": ")
            raise UserError(message) if kind == "user" else WorldFault(message)
        if "result" not in batch:
            return
        result = json.loads(batch["result"][0])
        if not feeder.done(result["batch_index"]):
            return
        verdicts = result["accepted"] + result["rejected"]
        self.tally.samples += verdicts + result["captioned"]
        self.tally.accepted += result["accepted"]
        self.tally.rejected += result["rejected"]
        self.tally.failed += result["failed"]
        self.tally.errors += result["errors"][: SHOWN - len(self.tally.errors)]
        for error in result["errors"]:
            log().warning("sample not annotated", error=error)
        self._ledger.add(result["ledger"])
        self._waiting += [Part(part["path"], part["nbytes"], part["rows"]) for part in result["parts"]]

    def _commit(self, force: bool = False) -> None:
        due = time.monotonic() - self._last >= self.run.spec.output.commit_every
        if self._waiting and (force or due):
            self._committer.commit(self._waiting)
            self._waiting = []
            self._last = time.monotonic()

    def _begin(self) -> None:
        """The run's row: only a run that says something leaves one."""
        if not self._begun:
            self._begun = True
            commit_run_row(self.run, "started", status="running", extra_json=json.dumps({"annotates": self.kind}))

    def _end_ledger(self, until: float) -> None:
        self._spent = {
            "allocated_accelerator_seconds": self._ledger.allocated(until),
            "overhead_json": json.dumps(
                {name: round(value, 4) for name, value in self._ledger.overhead(until).items()}
            ),
        }

    def _end(self, status: str, extra: dict[str, Any]) -> None:
        if self._begun:
            said = {"annotates": self.kind, **asdict(self.tally), **extra}
            commit_run_row(self.run, "ended", status=status, extra_json=json.dumps(said), **self._spent)
