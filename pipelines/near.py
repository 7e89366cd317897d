"""Near-duplicates among millions of signatures, without comparing all pairs.

Best first, a sample is dropped where it is near one that was kept: no two that are kept are near, and each that is dropped
has a kept one beside it (a greedy maximal independent set; unlike connected components it makes no chains).

Hashes: of `m` bands of 16 bits that differ in `D` bits together, by the pigeonhole principle one of the first `D mod m + 1`
differs in at most `D // m` bits, or one of the others in at most `D // m - 1` (Norouzi, Punjani and Fleet, "Fast search in
Hamming space with multi-index hashing", CVPR 2012, section 3). So nothing is missed.

Embeddings: those near a point lie in its own Voronoi cell or in one whose border is near; how near is exact for k-means
cells. So nothing is missed here either. (SemDeDup, Abbas et al. 2023, looks in the own cell only.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol

import numpy as np

BLOCK = 1024
"""Samples that are decided together; all pairs of a block are compared."""

EXPANDED = 1 << 21
"""Candidates that are in memory at a time."""

CHROMA_LEVELS = 12
"""Where small copies differ by more than this many levels (0-255) of chroma, equal luma makes no duplicate: two clips of one
shape in two colours have one DCT hash. On clips of the pack, re-encoding and a pixel's shift stay below 12 and other scenes
above it, nearly always."""

KEPT = -1

Match = Literal["either", "both"]


class Index(Protocol):
    """Knows what is kept and finds it again. Positions are those of the signatures that it was made of."""

    def within(self, block: slice) -> np.ndarray:
        """Boolean [b, b]: which of a block are near which before them."""
        ...

    def near(self, positions: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Boolean [k]: whether the samples at `positions` are near those at `others`, one by one."""
        ...

    def candidates(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (place in `positions`, a kept position) in pieces, all that are near among them."""
        ...

    def keep(self, positions: np.ndarray) -> None: ...


def thin(count: int, indexes: list[Index], match: Match = "either", first: int = 0) -> np.ndarray:
    """What is kept of `count` samples, best first: int64 [count], KEPT or the position of a kept one that is near.

    The `first` ones are kept without being looked at. Of several kept ones that are near, the best is named.
    """
    by = np.full(count, KEPT)
    for start in range(0, first, BLOCK):
        for index in indexes:
            index.keep(np.arange(start, min(first, start + BLOCK)))
    for start in range(first, count, BLOCK):
        block = np.arange(start, min(count, start + BLOCK))
        found = _nearest_kept(block, indexes, match)
        among = _combined([index.within(slice(start, start + len(block))) for index in indexes], match)
        for at in np.flatnonzero(among.any(axis=1) & (found == KEPT)):
            beside = np.flatnonzero(among[at] & (found == KEPT))
            if len(beside):
                found[at] = start + beside[0]
        by[block] = found
        for index in indexes:
            index.keep(block[found == KEPT])
    return by


def _nearest_kept(block: np.ndarray, indexes: list[Index], match: Match) -> np.ndarray:
    best = np.full(len(block), np.iinfo(np.int64).max)
    for index in indexes[:1] if match == "both" else indexes:
        for at, kept in index.candidates(block):
            near = index.near(block[at], kept)
            at, kept = at[near], kept[near]
            for other in indexes if match == "both" else ():
                if other is not index:
                    near = other.near(block[at], kept)
                    at, kept = at[near], kept[near]
            np.minimum.at(best, at, kept)
    best[best == np.iinfo(np.int64).max] = KEPT
    return best


def _combined(found: list[np.ndarray], match: Match) -> np.ndarray:
    return np.logical_and.reduce(found) if match == "both" else np.logical_or.reduce(found)


class HashIndex:
    """Luma hashes uint64 [n, f], f at most 3, that differ in at most `bits` of 64 on average, and chroma uint8 [n, c] that
    differs by more than CHROMA_LEVELS nowhere. About 22 f + c bytes a sample. `known` [n] false: near nothing."""

    def __init__(self, codes: np.ndarray, chroma: np.ndarray, known: np.ndarray, bits: float) -> None:
        self._codes, self._chroma, self._known = np.ascontiguousarray(codes.T), chroma, known
        self._most = int(bits * codes.shape[1])
        self._bands = np.ascontiguousarray(codes).view(np.uint16)
        bands = self._bands.shape[1]
        most, more = divmod(self._most, bands)
        self._masks = [_masks(most if band <= more else most - 1) for band in range(bands)]
        self._levels: list[_Level] = []

    def within(self, block: slice) -> np.ndarray:
        codes, chroma, known = self._codes[:, block], self._chroma[block].astype(np.int16), self._known[block]
        found = np.zeros((len(known), len(known)), bool)
        for start in range(0, len(known), 64):
            part = slice(start, start + 64)
            differing = np.zeros((len(known[part]), len(known)), np.uint8)
            for frame in codes:
                differing += np.bitwise_count(frame[part, None] ^ frame[None])
            found[part] = (differing <= self._most) & known[part, None] & known[None]
            found[part] &= np.tri(len(differing), len(known), start - 1, dtype=bool)
            rows, columns = np.nonzero(found[part])
            for piece in range(0, len(rows), EXPANDED // 64):
                row, column = start + rows[piece : piece + EXPANDED // 64], columns[piece : piece + EXPANDED // 64]
                found[row, column] = np.abs(chroma[row] - chroma[column]).max(axis=1, initial=0) <= CHROMA_LEVELS
        return found

    def near(self, positions: np.ndarray, others: np.ndarray) -> np.ndarray:
        differing = np.zeros(len(positions), np.uint8)
        for frame in self._codes:
            differing += np.bitwise_count(frame[positions] ^ frame[others])
        found = (differing <= self._most) & self._known[positions] & self._known[others]
        look = np.flatnonzero(found)
        for piece in range(0, len(look), EXPANDED // 64):
            some = look[piece : piece + EXPANDED // 64]
            levels = self._chroma[positions[some]].astype(np.int16) - self._chroma[others[some]]
            found[some] = np.abs(levels).max(axis=1, initial=0) <= CHROMA_LEVELS
        return found

    def candidates(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        places = np.flatnonzero(self._known[positions])
        bands = self._bands[positions[places]]
        for level in self._levels:
            for band, masks in enumerate(self._masks):
                if len(masks):
                    for at, kept in level.candidates(band, bands[:, band], masks):
                        yield places[at], kept

    def keep(self, positions: np.ndarray) -> None:
        positions = positions[self._known[positions]]
        # Each level is more than twice as large as the next, so that a sample is sorted anew a few times only.
        while self._levels and len(self._levels[-1].positions) <= 2 * len(positions):
            positions = np.concatenate([self._levels.pop().positions, positions])
        if len(positions):
            self._levels.append(_Level(positions, self._bands[positions]))


class _Level:
    """Some kept samples, by the value of each band."""

    def __init__(self, positions: np.ndarray, bands: np.ndarray) -> None:
        self.positions = positions
        self._order = [np.argsort(bands[:, band], kind="stable").astype(np.int32) for band in range(bands.shape[1])]
        self._starts = [
            np.concatenate([[0], np.cumsum(np.bincount(bands[:, band], minlength=1 << 16))]).astype(np.int32)
            for band in range(bands.shape[1])
        ]

    def candidates(self, band: int, keys: np.ndarray, masks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (place in `keys`, position) whose values of this band differ by one of the masks."""
        wanted = (keys[None] ^ masks[:, None]).ravel().astype(np.int64)
        lows = self._starts[band][wanted]
        counts = self._starts[band][wanted + 1] - lows
        hits = np.flatnonzero(counts)
        lows, counts, places = lows[hits], counts[hits].astype(np.int64), hits % len(keys)
        ends = np.cumsum(counts)
        # A bucket of a common value may hold very many: cut into pieces of candidates, not of keys.
        for start in range(0, int(ends[-1]) if len(ends) else 0, EXPANDED):
            stop = min(start + EXPANDED, int(ends[-1]))
            first, last = np.searchsorted(ends, (start, stop - 1), side="right")
            some = slice(first, last + 1)
            inside = np.minimum(ends[some], stop) - np.maximum(ends[some] - counts[some], start)
            which = np.repeat(np.arange(first, last + 1), inside)
            at = np.arange(start, stop) - (ends - counts)[which]
            yield places[which], self.positions[self._order[band][lows[which] + at]]


def _masks(bits: int) -> np.ndarray:
    """uint16: all values with at most so many bits set; none where bits is negative."""
    sets = (chosen for size in range(bits + 1) for chosen in combinations(range(16), size))
    return np.array([sum(1 << bit for bit in chosen) for chosen in sets], np.uint16)


@dataclass
class CosineIndex:
    """Unit vectors [n, d] whose dot product is at least `cosine`. `known` [n] false: near nothing.

    `centres` [k, d] are those of the cells; any give the same answer, good ones sooner.
    """

    vectors: np.ndarray
    known: np.ndarray
    cosine: float
    centres: np.ndarray

    def __post_init__(self) -> None:
        self._cells: list[np.ndarray] = [np.empty(0, np.int64) for _ in self.centres]
        gaps = self.centres[:, None] - self.centres[None] if len(self.centres) <= 64 else None
        square = (self.centres**2).sum(axis=1)
        flat = square[:, None] + square[None] - 2 * self.centres @ self.centres.T
        self._apart = np.linalg.norm(gaps, axis=-1) if gaps is not None else np.sqrt(np.maximum(flat, 0))
        # float16 is rounded: lengths are one to a thousandth
        self._reach = float(np.sqrt(max(0.0, 2 - 2 * self.cosine))) + 2e-3

    def within(self, block: slice) -> np.ndarray:
        vectors, known = self.vectors[block].astype(np.float32), self.known[block]
        return np.tril((vectors @ vectors.T >= self.cosine) & known[:, None] & known[None], k=-1)

    def near(self, positions: np.ndarray, others: np.ndarray) -> np.ndarray:
        found = self.known[positions] & self.known[others]
        look = np.flatnonzero(found)
        for piece in range(0, len(look), EXPANDED // 256):
            some = look[piece : piece + EXPANDED // 256]
            one, other = (self.vectors[at[some]].astype(np.float32) for at in (positions, others))
            found[some] = np.einsum("nd,nd->n", one, other) >= self.cosine
        return found

    def candidates(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        places = np.flatnonzero(self.known[positions])
        vectors = self.vectors[positions[places]].astype(np.float32)
        own, square = self._cell(vectors)
        nearest = square[np.arange(len(own)), own]
        # y nearer to c' than to c lies beyond their border: x is (|x - c'|^2 - |x - c|^2) / 2 |c - c'| away from it
        border = (square - nearest[:, None]) / np.maximum(2 * self._apart[own], 1e-12)
        for cell, kept in enumerate(self._cells):
            asking = np.flatnonzero(border[:, cell] <= self._reach) if len(kept) else ()
            for start in range(0, len(kept) if len(asking) else 0, BLOCK):
                some = kept[start : start + BLOCK]
                close = vectors[asking] @ self.vectors[some].astype(np.float32).T >= self.cosine - 1e-4
                at, which = np.nonzero(close)
                yield places[np.asarray(asking)[at]], some[which]

    def keep(self, positions: np.ndarray) -> None:
        positions = positions[self.known[positions]]
        if len(positions):
            own, _ = self._cell(self.vectors[positions].astype(np.float32))
            for cell in np.unique(own):
                self._cells[cell] = np.concatenate([self._cells[cell], positions[own == cell]])

    def _cell(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centre of each vector, and all squared distances [n, k]."""
        square = (vectors**2).sum(axis=1)[:, None] + (self.centres**2).sum(axis=1)[None] - 2 * vectors @ self.centres.T
        return square.argmin(axis=1), square


FITTED = 50_000
"""Vectors that k-means sees; the others go to the nearest centre."""


def cells(vectors: np.ndarray, count: int) -> np.ndarray:
    """Centres float32 [at most `count`, d] by k-means++ with a fixed seed (scipy) of FITTED of the vectors, evenly spaced."""
    from scipy.cluster.vq import kmeans2

    shown = vectors[:: max(1, -(-len(vectors) // FITTED))].astype(np.float32)
    count = min(count, len(np.unique(shown, axis=0)))
    if count < 2:
        return shown[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a cell is empty: it is left out
        centres, labels = kmeans2(shown, count, iter=10, minit="++", rng=np.random.default_rng(0))
    return np.asarray(centres[np.unique(labels)], np.float32)
