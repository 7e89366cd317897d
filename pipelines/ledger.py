"""Where a run's accelerator-seconds went: what the actors say of themselves, against what the rows hold.

Actors keep count in `stages.actor.LedgerEntry`. An actor that dies is started again in the same slot; what its last batch
cost it can say no more, and the time until the next one reports is `lost`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pyarrow.compute as pc

from infra.storage import Storage
from infra.tables import Table

Entry = dict[str, Any]


class Ledger:
    """The newest entry of every actor, by slot."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._released: dict[str, float] = {}

    def add(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.pop("steps", None)  # of one batch; see stages.actor.Step
            known = self._entries.get(entry["actor"])
            if known is None or known["ended_at"] < entry["ended_at"]:
                self._entries[entry["actor"]] = entry

    def release(self, at: float) -> None:
        """All actors so far are let go of."""
        for slot in self._slots():
            self._released.setdefault(slot, at)

    def allocated(self, until: float) -> float:
        """Accelerator-seconds that all slots held, from their start to their release or `until`."""
        return sum(
            (self._released.get(slot, until) - _began(lives)) * lives[0]["accelerators"]
            for slot, lives in self._slots().items()
        )

    @property
    def busy_share(self) -> float:
        """Share of the accelerator-seconds that the actors told of in which they had a batch in hand; 0 before any did."""
        kinds = ("boot_seconds", "load_seconds", "idle_seconds", "busy_seconds")
        told = sum(sum(entry[kind] for kind in kinds) * entry["accelerators"] for entry in self.entries)
        return sum(entry["busy_seconds"] * entry["accelerators"] for entry in self.entries) / told if told else 0.0

    def overhead(self, until: float, rows: float | None = None) -> dict[str, float]:
        """What of them is in no sample's cost, accelerator-seconds by kind.

        `rows` is what the rows' costs hold; left out, all that the actors shared over samples.

        boot, load, idle: of the actors. unshared: batches on their way in and out. repeats: computed for rows that were not
        committed in the end. lost: of workers that died, until the next one was there. tail: after the last batch.
        """
        kinds = dict.fromkeys(("boot", "load", "idle", "unshared", "repeats", "lost", "tail"), 0.0)
        shared = 0.0
        for slot, lives in self._slots().items():
            share, at = lives[0]["accelerators"], _began(lives)
            for entry in lives:
                gap = entry["started_at"] - at  # below 0 where Ray had a process waiting before the last one died
                kinds["lost"] += max(0.0, gap) * share
                kinds["boot"] += (entry["boot_seconds"] + min(0.0, gap)) * share
                kinds["load"] += entry["load_seconds"] * share
                kinds["idle"] += entry["idle_seconds"] * share
                kinds["unshared"] += (entry["busy_seconds"] - entry["shared_seconds"]) * share
                shared += entry["shared_seconds"] * share
                at = entry["ended_at"]
            kinds["tail"] += (self._released.get(slot, until) - at) * share
        kinds["repeats"] = 0.0 if rows is None else max(0.0, shared - rows)
        return kinds

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    @property
    def reproducible(self) -> str:
        found = {entry["reproducible"] for entry in self._entries.values()} - {""}
        return found.pop() if len(found) == 1 else ("tolerance" if found else "")

    def _slots(self) -> dict[str, list[Entry]]:
        """The lives of each actor, oldest first."""
        slots: dict[str, list[Entry]] = defaultdict(list)
        for entry in sorted(self._entries.values(), key=lambda entry: entry["started_at"]):
            slots[entry["slot"]].append(entry)
        return slots


def _began(lives: list[Entry]) -> float:
    """When the slot was first held: one that was restarted before it ever reported was held since it was asked for."""
    return float(lives[0]["slot_started_at"])


def rows_cost(storage: Storage, run_id: str) -> float:
    """Accelerator-seconds in the costs of the rows that a run committed."""
    total = 0.0
    for name in ("samples", "failures"):
        table = Table(storage, name)
        ours = [path for path in table.files() if path.rsplit("/", 1)[-1].startswith(f"{run_id}-")]
        for batch in table.dataset(ours).to_batches(columns=["cost"]):
            total += pc.sum(batch.column("cost").flatten().field("accelerator_seconds")).as_py() or 0.0
    return total
