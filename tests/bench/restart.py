"""From a killed driver to the first new commit, beside a run that begins: what a restart costs.

    ditmill bench restart [--kills 3]

Each trial kills the driver of a run of pack://tiny once something is committed, starts the command again at once,
and takes the time from the kill to the next committed row. The baseline of the same trial is the first run's own way from its
start to its first committed row, with the same models to load. What the kill lost are rows that were written and never
committed. One Prefect server and one Ray session each, as `ditmill run` starts them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from harness import Launch, Watched, kill_spec

from infra.storage import Storage
from pipelines.verify import verify

TARGET = 90.0
"""Seconds until a killed run commits again, at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    print(f"{'first commit':>13} {'after a kill':>13} {'ratio':>6} {'rows kept':>10} {'redone':>7}")
    recoveries, ratios = [], []
    for _ in range(options.kills):
        with tempfile.TemporaryDirectory() as folder:
            first, recovery, kept, redone = _trial(Path(folder))
        recoveries.append(recovery)
        ratios.append(recovery / first)
        print(f"{first:11.1f} s {recovery:11.1f} s {ratios[-1]:6.2f} {kept:10} {redone:7}", flush=True)
    worst = max(recoveries)
    met = "met" if worst <= TARGET else "MISSED"
    print(f"longest {worst:.1f} s, target {TARGET:.0f} s: {met}; ratio {max(ratios):.2f} at most")
    raise SystemExit(worst > TARGET)


def _trial(folder: Path) -> tuple[float, float, int, int]:
    """Seconds to the first commit, seconds from the kill to the next one, and the rows that were committed and lost then."""
    spec, dataset = kill_spec(folder / "data.yaml"), Watched(Storage(str(folder / "data")))
    launch = Launch(["run", str(spec)], folder / "first.log")
    again = None
    try:
        first = _until_rows(launch, dataset, 1) - launch.began
        struck = time.monotonic()
        launch.kill("driver")
        launch.popen.wait()
        kept, redone = dataset.rows(), dataset.uncommitted_rows()
        again = Launch(["run", str(spec)], folder / "again.log")
        recovery = _until_rows(again, dataset, kept + 1) - struck
        code, found = again.wait(), list(map(str, verify(Storage(str(folder / "data")))))
        if code or found:
            raise SystemExit(f"the run that went on is not whole: {found}\n{again.said()}")
    finally:
        for each in filter(None, (launch, again)):
            each.stop()
    return first, recovery, kept, redone


def _until_rows(launch: Launch, dataset: Watched, rows: int) -> float:
    while dataset.rows() < rows:
        if launch.ended:
            raise SystemExit(f"the run ended before it committed anything: {launch.said()}")
        time.sleep(0.05)
    return time.monotonic()


if __name__ == "__main__":
    main()
