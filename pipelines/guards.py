"""Guards: a run whose samples go wrong ends by itself, with what it has committed, and says so.

They look at the last `window` samples that came out, of the run and of each device. Where one device alone is in breach, it
is taken out and the run goes on without it. Samples come by batches, so that a window is as long as it must be and no longer
than that by a batch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import Field

from pipelines.sections import Section

FEWEST = 8
"""Samples on which a device is told from the others, where the run as a whole is in breach."""


class Guards(Section):
    """What ends a run that goes wrong: it finishes what is in hand, commits, and pauses its deployment."""

    max_failed: float | None = Field(
        None, ge=0, lt=1, description="Most failed samples among the last `window`, as a share."
    )
    min_accepted: float | None = Field(
        None, gt=0, le=1, description="Least accepted samples among the last `window`, as a share."
    )
    window: int = Field(200, ge=1, description="Samples that are looked at, of the run and of each device.")
    canary: bool = Field(
        True,
        description="Where there are several sampler groups, have each make the same sample first, in two steps; one that"
        " does not make it as the first group did is taken out.",
    )


@dataclass
class Tally:
    """Verdicts of the last samples, of all or of one device."""

    guards: Guards
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    _batches: deque[tuple[int, int, int]] = field(default_factory=deque)

    @property
    def samples(self) -> int:
        return self.accepted + self.rejected + self.failed

    @property
    def is_full(self) -> bool:
        return self.samples >= self.guards.window

    def add(self, accepted: int, rejected: int, failed: int) -> None:
        """Take in a batch, and let go of those that the window does without."""
        self._count(accepted, rejected, failed, 1)
        self._batches.append((accepted, rejected, failed))
        while self.samples - sum(self._batches[0]) >= self.guards.window:
            self._count(*self._batches.popleft(), -1)

    def breach(self) -> str:
        """What is wrong, naming the key, or empty."""
        most, least, seen = self.guards.max_failed, self.guards.min_accepted, self.samples
        of_last = f"of the last {seen} samples"
        if most is not None and self.failed > most * seen:
            return f"guards.max_failed: {self.failed} {of_last} failed, at most {most:.1%} may"
        if least is not None and self.accepted < least * seen:
            return f"guards.min_accepted: {self.accepted} {of_last} were accepted, at least {least:.1%} must be"
        return ""

    def _count(self, accepted: int, rejected: int, failed: int, sign: int) -> None:
        self.accepted += sign * accepted
        self.rejected += sign * rejected
        self.failed += sign * failed


class Breach(NamedTuple):
    """What is wrong, and the one device that it is wrong on; no device where it is the run's own."""

    why: str
    devices: str = ""


class Window:
    """The last samples of the run and of each device that made some, held against the guards."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards
        self._all = Tally(guards)
        self._of: dict[str, Tally] = {}

    def add(self, devices: str, accepted: int, rejected: int, failed: int) -> Breach | None:
        """Take in a batch that `devices` made. A breach, if there is one now; never before a window is full."""
        self._all.add(accepted, rejected, failed)
        self._of.setdefault(devices, Tally(self._guards)).add(accepted, rejected, failed)
        why = self._all.breach() if self._all.is_full else ""
        for name, tally in self._of.items():
            if (tally.is_full or (why and tally.samples >= FEWEST)) and (blamed := self._blamed(name)):
                return Breach(blamed, name)
        return Breach(why) if why else None

    def forget(self, devices: str) -> None:
        """These are out: what they made counts no more, and neither does what it was weighed with."""
        self._of.pop(devices, None)
        self._all = Tally(self._guards)

    def _blamed(self, devices: str) -> str:
        """What is wrong on these and, taken together, on no others."""
        others = [tally for name, tally in self._of.items() if name != devices]
        rest = Tally(
            self._guards,
            sum(tally.accepted for tally in others),
            sum(tally.rejected for tally in others),
            sum(tally.failed for tally in others),
        )
        return self._of[devices].breach() if rest.samples >= FEWEST and not rest.breach() else ""
