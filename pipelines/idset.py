"""A set of ids (32 hex digits) that holds ten million in 160 MB."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa


class IdSet:
    """Membership in a sorted array. Ids are hashes, evenly spread, so their first bits say where to start looking."""

    def __init__(self, columns: Iterable[pa.Array]) -> None:
        parts = [_halves(column) for column in columns]
        keys = np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)
        del parts
        first, second = keys[:, 0].copy(), keys[:, 1].copy()
        del keys
        # Sorting by the first halves is five times quicker than by both, and nearly always enough.
        order = np.argsort(first)
        first, second = first[order], second[order]
        if (first[1:] == first[:-1]).any():
            order = np.lexsort((second, first))
            first, second = first[order], second[order]
            new = np.ones(len(first), bool)
            new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
            first, second = first[new], second[new]
        self._first, self._second = first, second
        bits = max(1, len(first).bit_length() - 3)  # four to eight ids share them
        self._shift = np.uint64(64 - bits)
        self._starts = np.searchsorted(first, np.arange(2**bits, dtype=np.uint64) << self._shift)

    def __len__(self) -> int:
        return len(self._first)

    def contains(self, ids: Sequence[str]) -> np.ndarray:
        """Boolean array: which of `ids` are in the set."""
        if len(self) == 0 or len(ids) == 0:
            return np.zeros(len(ids), bool)
        first, second = _halves(pa.array(ids, pa.string())).T
        found = np.zeros(len(ids), bool)
        at = self._starts[first >> self._shift]
        look = np.flatnonzero(at < len(self))
        while len(look):
            here = self._first[at[look]]
            found[look] = (here == first[look]) & (self._second[at[look]] == second[look])
            look = look[(here <= first[look]) & ~found[look]]
            at[look] += 1
            look = look[at[look] < len(self)]
        return found


def _halves(column: pa.Array) -> np.ndarray:
    """The two 64-bit halves of each id, uint64 [n, 2]; Arrow keeps the digits of all ids in one run."""
    if len(column) == 0:
        return np.empty((0, 2), np.uint64)
    column = column.cast(pa.string())
    _, offsets, digits = column.buffers()
    start = int(np.frombuffer(offsets, np.int32)[column.offset])
    raw = bytes.fromhex(bytes(digits[start : start + 32 * len(column)]).decode("ascii"))
    return np.frombuffer(raw, np.dtype(">u8")).astype(np.uint64).reshape(-1, 2)
