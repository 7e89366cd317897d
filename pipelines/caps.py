"""Caps: at most so many samples of each value of an attribute, the best first."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from infra.errors import UserError
from pipelines.rules import Cap

SHOWN = 50
"""Values of a histogram; the others are counted together."""


class Values:
    """The values that samples have of one attribute, none, one or more: an int32 for each and one for each sample."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: dict[str, int] = {}
        self._flat = array("i")
        self._ends = array("q", [0])

    def append(self, values: Any) -> None:
        """Of the next sample: a value, a list of them, or None."""
        many = values if isinstance(values, list) else [] if values is None else [values]
        for value in dict.fromkeys(_text(value) for value in many if value is not None):
            code = self._codes.setdefault(value, len(self.names))
            if code == len(self.names):
                self.names.append(value)
            self._flat.append(code)
        self._ends.append(len(self._flat))

    def of(self, row: int) -> Sequence[int]:
        """Codes, places in `names`, of a sample."""
        return self._flat[self._ends[row] : self._ends[row + 1]]

    def counts(self, rows: Iterable[int]) -> np.ndarray:
        """How many of the rows have each value."""
        found = np.zeros(len(self.names), np.int64)
        for row in rows:
            for code in self.of(row):
                found[code] += 1
        return found


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def apply_caps(
    rows: np.ndarray, caps: Sequence[Cap], values: Sequence[Values]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Which of `rows` (best first, places in `values`) stay, and what became of each cap.

    A row goes in unless a value of it is full in any cap, and is removed by the first that is. A share is one of what stays:
    limits come down until each holds, from the largest that could (for one cap the result is the largest there is).
    UserError where a share of what has values comes down to none.
    """
    limits = [cap.most if cap.most is not None else _share(cap, len(rows)) for cap in caps]
    while True:
        stay, removed = _fill(rows, values, limits)
        holds = True
        for at, cap in enumerate(caps):
            if cap.share is not None and limits[at] > (most := _share(cap, len(stay))):
                limits[at], holds = most, False
        for cap, limit, each in zip(caps, limits, values, strict=True):
            if limit == 0 and any(len(each.of(row)) for row in rows.tolist()):
                raise UserError(
                    f"cap: {cap.title}: no selection of these {len(rows)} samples has at most {cap.share:.3g} of it with each"
                    " value; allow a larger share, or give `most`"
                )
        if holds:
            break
    return stay, [
        _said(cap, limit, count, each, rows, stay)
        for cap, limit, count, each in zip(caps, limits, removed, values, strict=True)
    ]


def _share(cap: Cap, count: int) -> int:
    return int((cap.share or 0.0) * count + 1e-9)  # 0.29 of 100 is 28.999999999999996


def _fill(rows: np.ndarray, values: Sequence[Values], limits: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    room = [[limit] * len(each.names) for each, limit in zip(values, limits, strict=True)]
    removed = [0] * len(limits)
    stay = np.zeros(len(rows), bool)
    for at, row in enumerate(rows.tolist()):
        codes = [each.of(row) for each in values]
        full = next((cap for cap, mine in enumerate(codes) if any(room[cap][code] <= 0 for code in mine)), None)
        if full is not None:
            removed[full] += 1
            continue
        stay[at] = True
        for cap, mine in enumerate(codes):
            for code in mine:
                room[cap][code] -= 1
    return rows[stay], removed


def _said(cap: Cap, limit: int, removed: int, values: Values, rows: np.ndarray, stay: np.ndarray) -> dict[str, Any]:
    before, after = values.counts(rows.tolist()), values.counts(stay.tolist())
    order = sorted(range(len(before)), key=lambda code: (-int(before[code]), values.names[code]))
    shown = [code for code in order if before[code]]
    return {
        "by": cap.title,
        "most": limit,
        "share": cap.share,
        "removed": removed,
        "values": [
            {"value": values.names[code][:200], "before": int(before[code]), "after": int(after[code])}
            for code in shown[:SHOWN]
        ],
        "other_values": {
            "count": len(shown[SHOWN:]),
            "before": int(before[shown[SHOWN:]].sum()),
            "after": int(after[shown[SHOWN:]].sum()),
        },
    }
