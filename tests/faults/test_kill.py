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

SURVIVED = ("actor", "prefect", "mailbox", "reader")
"""What a run goes on without: it is started again inside of the run."""


@dataclass
class Kill:
    """One kill: of which process, where in its run, and what became of it."""

    process: str
    when: str
    seconds: float  # into its run
    committed: int
    lost: int  # rows that were written and not committed
    outcome: str = ""
    recovery: float | None = None  # seconds until the next commit


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
        """Kill `process` once `when` has come."""
        launch = self.current
        if not self._come(launch, when):
            return  # the run was done first
        victim = launch.kill(process, self.rng.choice)
        if victim is None:
            return
        rows = self.dataset.rows()
        kill = Kill(victim.kind if process == "any" else process, when, 0.0, rows, self.dataset.uncommitted_rows())
        kill.seconds = time.monotonic() - launch.began
        self.kills.append(kill)
        began = time.monotonic()
        while time.monotonic() - began < 90:
            if launch.ended:
                kill.outcome = "ended" if launch.popen.returncode else "survived"
                assert launch.left_over() == [], f"{process}: a killed run left processes"
                launch = self.launch() if kill.outcome == "ended" else launch
                break
            if self.dataset.rows() > rows:
                kill.outcome = "survived"
                break
            time.sleep(0.02)
        while self.dataset.rows() == rows and not launch.ended:
            time.sleep(0.02)
        kill.recovery = time.monotonic() - began

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
    head = f"{'process':9} {'when':10} {'after':>7} {'rows':>5} {'lost':>5}  {'run':9} {'recovery':>8}"
    lines = [f"kills of seed {seed} (DITMILL_FAULT_SEED={seed} repeats it)", head]
    for number, chain in enumerate(chains):
        for kill in chain.kills:
            recovery = "" if kill.recovery is None else f"{kill.recovery:.1f} s"
            lines.append(
                f"{kill.process:9} {kill.when:10} {kill.seconds:5.1f} s {kill.committed:5} {kill.lost:5}"
                f"  {kill.outcome:9} {recovery:>8}"
            )
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
    chain = Chain(tmp_path, rng)
    # Two that the run goes on without, the commit path, the whole Ray session, and the driver anywhere.
    plan = [("actor", "committed"), ("driver", "written"), ("prefect", "loading"), ("raylet", "committed")]
    plan.append(("driver", rng.choice(["at once", "starting", "loading", "committed"])))
    _take(chain, plan, reference)
    with capsys.disabled():
        print("\n" + _summary(seed, [chain]))
    assert len(chain.kills) == 5


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
            (rng.choice(["driver", "driver", *SURVIVED, "raylet", "gcs", "any"]), rng.choice(moments))
            for _ in range(rng.randint(2, 6))
        ]
        _take(chains[-1], plan, reference)
        with capsys.disabled():
            print("\n" + _summary(seed, chains[-1:]))
    with capsys.disabled():
        print("\n" + _summary(seed, chains))
