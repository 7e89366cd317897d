"""A dataset whose run loses processes to SIGKILL again and again, and what each kill cost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import OUTPUT, Launch, Watched, kill_spec

from infra.storage import Storage

SURVIVED = ("actor", "prefect", "mailbox", "reader", "raylet")
"""What a run goes on without: it is started again inside of the run."""
FATAL = ("driver", "gcs")


@dataclass
class Kill:
    """One kill: of which process, where in its run, and what became of it."""

    process: str
    when: str
    seconds: float  # into its run
    committed: int  # rows that the dataset had
    redone: int = 0  # rows that were written and never committed
    outcome: str = "went on"
    recovery: float = 0.0  # seconds until the dataset grew again; 0 where all was there


@dataclass
class Chain:
    """A dataset whose run is killed again and again."""

    folder: Path
    rng: random.Random
    output: dict[str, Any] | None = None
    """Of the spec, if not a folder beside it."""
    storage: Storage | None = None
    """How to look at it then."""
    patience: float = 120.0
    """Seconds in which a run that was struck must end or go on."""
    kills: list[Kill] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self) -> None:
        changes = {"output": OUTPUT | self.output} if self.output else {}
        self.spec = kill_spec(self.folder / "data.yaml", **changes)
        self.dataset = Watched(self.storage or Storage(str(self.folder / "data")))

    def launch(self) -> Launch:
        self.launches.append(Launch(["run", str(self.spec)], self.folder / f"log{len(self.launches)}"))
        return self.launches[-1]

    @property
    def current(self) -> Launch:
        return self.launches[-1] if self.launches and not self.launches[-1].ended else self.launch()

    def strike(self, process: str, when: str) -> None:
        """Kill `process` once `when` has come, and wait until the dataset grows again."""
        launch = self.current
        if not self._come(launch, when):
            return  # the run was done first
        victim = launch.kill(process, self.rng.choice)
        if victim is None:
            return
        struck = time.monotonic()
        kill = Kill(victim.kind if process == "any" else process, when, struck - launch.began, self.dataset.rows())
        self.kills.append(kill)
        written = kill.committed + self.dataset.uncommitted_rows()
        while not launch.ended and not (kill.process not in FATAL and self.dataset.rows() > written):
            assert time.monotonic() - struck < self.patience, f"{process}: no end and no progress; {launch.said()}"
            time.sleep(0.02)
        if launch.ended and launch.popen.returncode:
            kill.outcome = "ended"
            assert launch.left_over() == [], f"{process}: processes are left over"
            written, kill.redone = self.dataset.rows(), self.dataset.uncommitted_rows()
            launch = self.launch()
        while self.dataset.rows() <= written and not launch.ended:
            time.sleep(0.02)
        if self.dataset.rows() > written:
            kill.recovery = time.monotonic() - struck

    def finish(self) -> None:
        """Run it until it says that all is done."""
        for _ in range(3):
            if self.current.wait() == 0:
                return
        raise AssertionError(self.current.said())

    def take(self, plan: list[tuple[str, str]], latents: dict[str, np.ndarray]) -> None:
        """All strikes of `plan`, and the run to its end; AssertionError if the dataset is not as it was without them."""
        try:
            for process, when in plan:
                self.strike(process, when)
            self.finish()
            for launch in self.launches:
                assert launch.left_over() == []
            self.dataset.check(latents)
        finally:
            for launch in self.launches:
                launch.stop()

    def _come(self, launch: Launch, when: str) -> bool:
        """Wait for the moment; False if the run ended before."""
        rows = self.dataset.rows()
        moments: dict[str, Callable[[], bool]] = {
            "at once": lambda: True,
            "starting": lambda: bool(launch.find("raylet")),
            "prompts": lambda: self.dataset.versions("prompts") > 1,
            "loading": lambda: bool(launch.find("actor")),
            "written": lambda: bool(self.dataset.uncommitted()) and self.dataset.rows() > rows,
            "committed": lambda: self.dataset.rows() > rows,
        }
        while not moments[when]():
            if launch.ended:
                return False
            time.sleep(0.005 if when == "written" else 0.05)
        if when != "written":
            time.sleep(self.rng.uniform(0, 5 if when == "at once" else 0.5))
        return not launch.ended


def summary(seed: int, chains: list[Chain]) -> str:
    """A line a kill, for a person."""
    lines = [
        f"kills of seed {seed} (DITMILL_FAULT_SEED={seed} repeats it)",
        f"{'process':9} {'when':10} {'after':>7} {'rows':>5} {'redone':>6}  {'the run':8} {'next rows after':>15}",
    ]
    for number, chain in enumerate(chains):
        lines += [
            f"{kill.process:9} {kill.when:10} {kill.seconds:5.1f} s {kill.committed:5} {kill.redone:6}  {kill.outcome:8}"
            f" {kill.recovery:13.1f} s"
            for kill in chain.kills
        ]
        lines.append(f"  dataset {number}: {len(chain.launches)} runs, {chain.dataset.rows()} rows, each once")
    return "\n".join(lines)


def random_plan(rng: random.Random) -> list[tuple[str, str]]:
    """Which processes to kill one after the other, and when."""
    moments = ["at once", "starting", "prompts", "loading", "written", "committed", "committed"]
    processes = ["driver", "driver", *SURVIVED, *FATAL[1:], "any"]
    return [(rng.choice(processes), rng.choice(moments)) for _ in range(rng.randint(2, 6))]
