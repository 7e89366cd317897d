"""Exactly once: a run loses processes to SIGKILL at random moments and is run again, and the dataset is as if it had not."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import Launch, Reference, Watched, kill_spec

pytestmark = pytest.mark.ray

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
    recovery: float = 0.0  # seconds until the dataset grew again


@dataclass
class Chain:
    """A dataset whose run is killed again and again."""

    folder: Path
    rng: random.Random
    kills: list[Kill] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec = kill_spec(self.folder / "data.yaml")
        self.dataset = Watched(self.folder / "data")

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
            assert time.monotonic() - struck < 120, f"{process}: no end and no progress; {launch.said()}"
            time.sleep(0.02)
        if launch.ended and launch.popen.returncode:
            kill.outcome = "ended"
            assert launch.left_over() == [], f"{process}: processes are left over"
            written, kill.redone = self.dataset.rows(), self.dataset.uncommitted_rows()
            launch = self.launch()
        while self.dataset.rows() <= written and not launch.ended:
            time.sleep(0.02)
        kill.recovery = time.monotonic() - struck

    def finish(self) -> None:
        """Run it until it says that all is done."""
        for _ in range(3):
            if self.current.wait() == 0:
                return
        raise AssertionError(self.current.said())

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


def _summary(seed: int, chains: list[Chain]) -> str:
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


def _take(chain: Chain, plan: list[tuple[str, str]], reference: Reference) -> None:
    try:
        for process, when in plan:
            chain.strike(process, when)
        chain.finish()
        for launch in chain.launches:
            assert launch.left_over() == []
        chain.dataset.check(reference.latents)
    finally:
        for launch in chain.launches:
            launch.stop()


def _rng() -> tuple[int, random.Random]:
    seed = int(os.environ.get("DITMILL_FAULT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"seed {seed}")
    return seed, random.Random(seed)


def test_a_run_killed_five_times_is_as_if_it_had_not_been(
    tmp_path: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, rng = _rng()
    plan = [
        ("driver", rng.choice(["at once", "starting", "prompts", "loading"])),
        ("actor", "committed"),
        ("driver", "written"),  # between a part and its transaction
        ("prefect", "loading"),
        ("raylet", "committed"),  # the whole Ray session
    ]
    chains: list[Chain] = []
    struck = 0
    while struck < len(plan):  # a run may be done before its kill comes: then another takes it
        folder = tmp_path / f"chain{len(chains)}"
        folder.mkdir()
        chains.append(Chain(folder, rng))
        _take(chains[-1], plan[struck:], reference)
        assert chains[-1].kills
        struck += len(chains[-1].kills)
    with capsys.disabled():
        print("\n" + _summary(seed, chains))


@pytest.mark.soak
def test_a_hundred_kills_at_random_moments(
    tmp_path: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, rng = _rng()
    wanted = int(os.environ.get("DITMILL_FAULT_KILLS") or 100)
    chains: list[Chain] = []
    moments = ["at once", "starting", "prompts", "loading", "written", "committed", "committed"]
    while sum(len(chain.kills) for chain in chains) < wanted:
        folder = tmp_path / f"chain{len(chains)}"
        folder.mkdir()
        chains.append(Chain(folder, rng))
        plan = [
            (rng.choice(["driver", "driver", *SURVIVED, "gcs", "any"]), rng.choice(moments))
            for _ in range(rng.randint(2, 6))
        ]
        _take(chains[-1], plan, reference)
        with capsys.disabled():
            print("\n" + _summary(seed, chains[-1:]))
    with capsys.disabled():
        print("\n" + _summary(seed, chains))
