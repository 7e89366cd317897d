"""`ditmill report --live`: a run on the terminal, and a page that a browser's tab follows, until the run ends."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from flows.console import duration
from pipelines.follow import LOOK_SECONDS, Look, Run, follow
from pipelines.report import build_report

if TYPE_CHECKING:
    from rich.table import Table

    from infra.storage import Storage

REFRESH_SECONDS = 10


def report_live(storage: Storage, every: int, seconds: float = LOOK_SECONDS) -> None:
    """Follow the live runs, and write the report anew after every `every` commits; at their end without its refresh."""
    from rich.console import Console
    from rich.live import Live

    written: int | None = None
    said: list[str] = []
    with ExitStack() as stack:
        shown: Live | None = None
        for found in follow(storage, seconds):
            if not found.runs:
                if written is None:
                    print("no run is live")
                continue
            if written is None and sys.stdout.isatty():
                shown = stack.enter_context(Live(console=Console(), auto_refresh=False))
            if written is None or found.commits - written >= every:
                build_report(storage, refresh=REFRESH_SECONDS, sheet=False)
                if written is None and shown is None:
                    print(f"follow it at {storage.root}/report/index.html", flush=True)
                written = found.commits
            if shown is not None:
                shown.update(table(found), refresh=True)
            elif (now := [line(run) for run in found.runs]) != said:
                said = now
                print("\n".join(said), flush=True)


def table(found: Look) -> Table:
    """A row for each live run."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "for", "done", "accepted", "rejected", "failed", "samples/s", "s/accepted", "left"):
        drawn.add_column(heading, justify="left" if heading in ("run", "state") else "right")
    drawn.add_column("last commit", justify="right")
    for run in found.runs:
        drawn.add_row(run.run_id, run.state, *_cells(run).values())
    return drawn


def line(run: Run) -> str:
    """The same where there is no terminal, without what changes by itself."""
    kept = ("done", "accepted", "rejected", "failed", "samples/s", "s/accepted")
    cells = _cells(run)
    return f"{run.run_id} {run.state}: " + ", ".join(f"{name} {cells[name]}" for name in kept)


def _cells(run: Run) -> dict[str, str]:
    per, left = run.per_accepted, run.seconds_left
    total = "?" if run.total is None else str(run.total)
    return {
        "for": duration(run.seconds),
        "done": f"{run.before_done + run.done}/{total}",
        "accepted": str(run.accepted),
        "rejected": str(run.rejected),
        "failed": str(run.failed),
        "samples/s": f"{run.rate:.2f}" if run.rate else "-",
        "s/accepted": "-" if per is None else f"{per:.2f}",
        "left": "-" if left is None else duration(left),
        "last commit": "-" if run.last_commit is None else f"{duration(time.time() - run.last_commit)} ago",
    }
