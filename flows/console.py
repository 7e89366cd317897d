"""What a person sees of a run: a live line on a terminal, one JSON line every ten seconds elsewhere, and the summary."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from infra.printable import printable
from infra.telemetry import values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.dedup import RecordReport
    from pipelines.generate import Outcome, Progress, StopRequest
    from pipelines.report import ReportSummary
    from pipelines.resolve import Resolved
    from pipelines.verify import Finding

JSON_EVERY = 10.0
LINE_EVERY = 0.25


class Console:
    """Says on stderr how a run goes; stdout is for results."""

    def __init__(self, as_json: bool = False) -> None:
        from pipelines.generate import StopRequest

        self.stop: StopRequest = StopRequest()
        self.result: dict[str, Any] | None = None
        self._as_json = as_json
        self._results = sys.stdout
        self._live = sys.stderr.isatty() and not as_json
        self._last = 0.0
        self._width = 0

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._as_json:
            return
        self._clear()
        print(printable(text), file=sys.stderr, flush=True)

    def records(self, report: RecordReport) -> None:
        self.say(f"prompts: {report.summary()}")
        for example in report.examples:
            if example.kind != "identical":
                self.say(f"  {example.kind}: {example.prompt!r} ~ {example.like!r}")

    def progress(self, progress: Progress) -> None:
        """The live line, or a JSON line, if it is time for one."""
        every = LINE_EVERY if self._live else JSON_EVERY
        if time.monotonic() - self._last < every:
            return
        self._last = time.monotonic()
        rate = progress.rate
        left = (progress.total - progress.before_done - progress.done) / rate if rate else None
        if self._live:
            if not progress.done:
                text = f"loading models ... {time.time() - progress.started:.0f} s"
            else:
                text = (
                    f"{progress.before_done + progress.done}/{progress.total}  accepted {progress.accepted}"
                    f"  rejected {progress.rejected}  failed {progress.failed}  {rate:.2f} samples/s"
                    + (f"  {duration(left)} left" if left is not None else "")
                )
            self._clear()
            self._width = len(text)
            print(text, end="", file=sys.stderr, flush=True)
        else:
            line = {
                "event": "progress",
                **values(),
                "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "accepted": progress.accepted,
                "rejected": progress.rejected,
                "failed": progress.failed,
                "committed": progress.committed,
                "total": progress.total,
                "samples_per_second": round(rate, 3),
                "seconds_left": None if left is None else round(left),
            }
            print(json.dumps(line), file=sys.stderr, flush=True)

    def verified(self, findings: list[Finding]) -> None:
        for finding in findings[:20]:
            self.say(f"verify: {finding}")

    def finished(
        self, resolved: Resolved, outcome: Outcome, report: ReportSummary | None, findings: list[Finding]
    ) -> None:
        """The summary: where things are and what was measured."""
        self._clear()
        spec, progress = resolved.spec, outcome.progress
        seconds = time.time() - progress.started
        root = resolved.storage.root
        result: dict[str, Any] = {
            "run_id": resolved.run_id,
            "status": outcome.status,
            "why": outcome.why,
            "dataset": root,
            "report": f"{root}/report/index.html",
            "accepted": progress.accepted,
            "rejected": progress.rejected,
            "failed": progress.failed,
            "seconds": round(seconds, 1),
            "samples_per_second": round(progress.rate, 3),
            "accelerator_seconds": round(outcome.allocated, 1),
            "overhead": {name: round(value, 1) for name, value in outcome.overhead.items()},
            "accelerator_seconds_per_accepted": round(outcome.allocated / progress.accepted, 3)
            if progress.accepted
            else None,
            "bytes": progress.nbytes,
            "verify": [str(finding) for finding in findings],
        }
        self.result = result
        if self._as_json:
            print(json.dumps(result), file=self._results, flush=True)
            return
        print(printable(_summary(spec.name, result)), file=self._results, flush=True)

    def _clear(self) -> None:
        if self._live and self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr)
            self._width = 0


@contextmanager
def looking(at: str = "looking at media") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for a command that goes through samples in this process, told how many of how many; else nothing."""
    from rich.console import Console as Terminal
    from rich.progress import Progress as Bar

    with Bar(console=Terminal(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(at, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def places(root: str) -> list[str]:
    """Lines that say where a dataset's things are."""
    page = f"{root}/report/index.html"
    return [f"  dataset   {root}", f"  gallery   {page}", f"  funnel    {page}#funnel"]


def _summary(name: str, result: dict[str, Any]) -> str:
    done = result["accepted"] + result["rejected"] + result["failed"]
    per = result["accelerator_seconds_per_accepted"]
    overhead = ", ".join(f"{kind} {seconds}" for kind, seconds in result["overhead"].items() if seconds)
    checked = (
        "verified: every promise holds" if not result["verify"] else f"verify found {len(result['verify'])} problems"
    )
    return "\n".join(
        [
            f"{name}: {done} samples, {result['accepted']} accepted, {result['rejected']} rejected, {result['failed']} failed"
            f" in {result['seconds']} s ({result['status']})",
            *places(result["dataset"]),
            f"  measured  {result['accelerator_seconds']} accelerator-seconds"
            + (f", {per} for each accepted sample" if per is not None else "")
            + (f"; {rate} samples/s once models were loaded" if (rate := result["samples_per_second"]) else "")
            + f"; {result['bytes'] / 1e6:.1f} MB",
            f"            of these not in any sample: {overhead or 'none'}   (on a CPU an actor counts as one accelerator)",
            f"  {checked}",
        ]
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


_current: ContextVar[Console | None] = ContextVar("console", default=None)


def current_console() -> Console:
    """The console of this run; a deployment's flow run gets one that writes JSON lines."""
    return _current.get() or Console()


@contextmanager
def console(made: Console) -> Iterator[Console]:
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)
