"""Which samples of a release stay where it is held to rules as a whole: no near-duplicates, no value above its cap.

Best first, by the weighted mean of the scores that the rubric gives a weight, then by sample_id: the same dataset gives the
same release. What is below a share to keep goes first, then near-duplicates, then caps. In memory is less than a kilobyte a
sample, and another with embeddings.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.storage import Storage
from pipelines.caps import Values, apply_caps
from pipelines.choose import evaluate
from pipelines.embedding import embedding_kind
from pipelines.idset import IdSet
from pipelines.near import KEPT, CosineIndex, HashIndex, Index, cells, thin
from pipelines.ranking import keep_best, quality, rank_weights
from pipelines.rules import TOPIC, Cap, Rules
from pipelines.signatures import (
    EmbeddingKind,
    HashKind,
    Kind,
    Place,
    Progress,
    Signatures,
    embeddings,
    hashes,
    place_of,
)

if TYPE_CHECKING:
    from pipelines.release import Released, Snapshot

# Thai, Lao, Burmese, Khmer, Chinese, Japanese; Korean has blanks, but adds particles to its words
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
_LETTER = rf"[^\W{_UNSPACED}]"

COLUMNS = ["sample_id", "verdict", "scores", "media", "num_frames"]
MEDIA = ["sample_id", "media", "num_frames"]
CLUSTERS = 20
"""Largest clusters that a report shows."""
MEMBERS = 5
"""Removed samples of a cluster that are named, the best."""


@dataclass
class Selected:
    """The ids that stay, and what the manifest says of the others."""

    ids: IdSet
    said: dict[str, Any]
    shown: dict[str, str] = field(default_factory=dict)
    """Sample id -> the earlier release that it is shown from, or ''."""


@dataclass
class _Candidates:
    """Samples that met the condition, best first."""

    ids: np.ndarray  # S32 [n]
    media: np.ndarray  # S32 [n]: sha256, or b"" where there is nothing to look at


@dataclass
class _Signed:
    """Signatures of earlier releases' media and then of the candidates'; `known` where there is one."""

    earlier: int
    by_hash: tuple[np.ndarray, np.ndarray] | None = None
    by_embedding: tuple[np.ndarray, np.ndarray] | None = None


def select(storage: Storage, snapshot: Snapshot, chosen: IdSet, rules: Rules, progress: Progress) -> Selected:
    """Hold the `chosen` samples of a dataset to `rules`."""
    weights = rules.rank or rank_weights(storage)
    chosen, keeps, below = keep_best(snapshot, chosen, rules.keep or {}, weights)
    found = _candidates(snapshot, chosen, weights)
    earlier = _releases(storage, rules)
    kinds: list[Kind] = [HashKind()] if rules.near_duplicates and rules.near_duplicates.hash is not None else []
    if rules.embedding is not None:
        kinds.append(embedding_kind(rules.embedding))
    signatures = Signatures(storage, kinds, progress)
    others = _Earlier(storage, earlier)

    def places() -> Iterator[Place]:
        for batch in others.batches():
            yield from filter(None, map(place_of, batch.select(MEDIA).to_pylist()))
        for batch, _ in snapshot.chosen(chosen, ["verdict", *MEDIA]):
            yield from filter(None, map(place_of, batch.select(MEDIA).to_pylist()))

    signed = _sign(signatures, kinds, others.media, found, places)
    said: dict[str, Any] = {
        "rules": rules.model_dump(mode="json"),
        "rank": weights,
        "keep": keeps,
        "signatures": [kind.name for kind in kinds],
        "embedding": next((kind.version for kind in kinds if isinstance(kind, EmbeddingKind)), None),
        "candidates": below + len(found.ids),
        "not_compared": {"samples": 0, "why": signatures.faults},
    }
    selected = Selected(IdSet([]), said)
    rows = np.arange(len(found.ids))
    if rules.near_duplicates is not None:
        rows = _without_duplicates(rules, found, others, signed, selected)
    if rules.caps:
        rows = _capped(snapshot, rules, found, rows, signed, selected)
    said["kept"] = len(rows)
    if not len(rows):
        raise UserError("release: nothing is left of it; allow more, or release without --against")
    selected.ids = IdSet([pa.array(found.ids[rows].astype(str))])
    return selected


def told(said: Mapping[str, Any]) -> Iterator[str]:
    """What a person is told of a selection, in a few words each."""
    for keep in said.get("keep") or ():
        yield f"{keep['removed']} removed below {keep['score']} {keep['threshold']:.4g}, to keep {keep['share']:.4g}"
    if near := said.get("near_duplicates"):
        yield f"{near['removed']} near-duplicates removed in {near['clusters']} clusters"
        if near["in_earlier_releases"]:
            yield f"{near['in_earlier_releases']} left out that earlier releases have"
    for cap in said.get("caps") or ():
        yield f"{cap['removed']} removed by the cap on {cap['by']}"
    if said and (blind := said["not_compared"]["samples"]):
        yield f"{blind} could not be compared, as their media cannot be read"


def _candidates(snapshot: Snapshot, chosen: IdSet, weights: Mapping[str, float]) -> _Candidates:
    ids, media, ranks = [np.empty(0, "S32")], [np.empty(0, "S32")], [np.empty(0)]
    for batch, _ in snapshot.chosen(chosen, COLUMNS):
        rows = batch.to_pylist()
        ids.append(np.array([row["sample_id"] for row in rows], "S32"))
        media.append(_sha256(rows))
        ranks.append(np.array([quality(row["scores"], weights) for row in rows], np.float64))
    every = np.concatenate(ids)
    order = np.lexsort((every, -np.concatenate(ranks)))
    return _Candidates(every[order], np.concatenate(media)[order])


def _sha256(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([place.sha256 if (place := place_of(row)) else b"" for row in rows], "S32")


def _releases(storage: Storage, rules: Rules) -> list[Released]:
    from pipelines.release import list_releases, read_release

    if rules.against == "all":
        return list_releases(storage)
    return [read_release(storage, name) for name in rules.against]


class _Earlier:
    """Samples of earlier releases: their ids, and their media with the release that had them first."""

    def __init__(self, storage: Storage, releases: list[Released]) -> None:
        self._storage, self._releases = storage, releases
        ids, media, ours = [], [np.empty(0, "S32")], [np.empty(0, np.int64)]
        for at, batch in self._numbered():
            ids.append(batch.column("sample_id"))
            some = _sha256(batch.to_pylist())
            media.append(some[some != b""])
            ours.append(np.full(len(media[-1]), at))
        self.ids = IdSet(ids)
        self.media, first = np.unique(np.concatenate(media), return_index=True)
        self._release = np.concatenate(ours)[first]

    def batches(self) -> Iterator[pa.RecordBatch]:
        return (batch for _, batch in self._numbered())

    def find(self, sha256: set[bytes]) -> Iterator[tuple[bytes, str, str]]:
        """(sha256, sample id, release) of some media; one of each."""
        left = set(sha256)
        for at, batch in self._numbered() if left else ():
            rows = batch.to_pylist()
            for key, row in zip(_sha256(rows).tolist(), rows, strict=True):
                if key in left:
                    left.discard(key)
                    yield key, row["sample_id"], self._releases[at].name

    def _numbered(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        for at, made in enumerate(self._releases):
            for file in made.files:
                if file["path"].endswith(".parquet"):
                    data = io.BytesIO(self._storage.read_bytes(file["path"]))
                    for batch in pq.ParquetFile(data).iter_batches(columns=MEDIA):
                        yield at, batch


def _sign(
    signatures: Signatures,
    kinds: list[Kind],
    earlier: np.ndarray,
    found: _Candidates,
    places: Callable[[], Iterator[Place]],
) -> _Signed:
    media = np.concatenate([earlier, found.media])
    signed = _Signed(len(earlier))
    for kind, values in zip(kinds, signatures.of(media, places), strict=True):
        if isinstance(kind, HashKind):
            signed.by_hash = values
        else:
            signed.by_embedding = values
    return signed


def _without_duplicates(
    rules: Rules, found: _Candidates, others: _Earlier, signed: _Signed, selected: Selected
) -> np.ndarray:
    """Rows of the candidates that are in no earlier release and near none that was kept, or is in one."""
    near = rules.near_duplicates
    assert near is not None
    first, total = signed.earlier, signed.earlier + len(found.ids)
    there = np.zeros(total, bool)
    there[first:] = others.ids.contains(found.ids.astype(str).tolist()) if first or len(others.ids) else False
    indexes: list[Index] = []
    looked_at = np.zeros(total, bool)
    if signed.by_hash is not None and near.hash is not None:
        values, known = signed.by_hash
        looked_at |= known
        if known.any():
            indexes.append(HashIndex(*hashes(values), known & ~there, near.hash))
    if signed.by_embedding is not None and near.cosine is not None:
        values, known = signed.by_embedding
        looked_at |= known
        if known.any():
            vectors = embeddings(values)
            centres = cells(vectors[known], max(1, min(1024, int(known.sum() ** 0.5))))
            indexes.append(CosineIndex(vectors, known & ~there, near.cosine, centres))
    wanted = (near.hash is not None) + (near.cosine is not None)
    by = np.full(total, KEPT)
    if indexes and (near.match == "either" or len(indexes) == wanted):
        by = thin(total, indexes, near.match, first)
    removed = np.flatnonzero(by != KEPT)
    selected.said["not_compared"]["samples"] = int((~looked_at[first:] & ~there[first:]).sum())
    selected.said["near_duplicates"] = {
        "removed": len(removed),
        "of_earlier_releases": int((by[removed] < first).sum()),
        "in_earlier_releases": int(there.sum()),
        "clusters": len(np.unique(by[removed])),
        "largest": _largest(by, removed, first, found, others, selected),
    }
    return np.flatnonzero((by[first:] == KEPT) & ~there[first:])


def _largest(
    by: np.ndarray, removed: np.ndarray, first: int, found: _Candidates, others: _Earlier, selected: Selected
) -> list[dict[str, Any]]:
    kept, counts = np.unique(by[removed], return_counts=True)
    largest = np.lexsort((kept, -counts))[:CLUSTERS]
    theirs = {bytes(others.media[kept[at]]) for at in largest if kept[at] < first}
    known = {key: (sample_id, name) for key, sample_id, name in others.find(theirs)}
    said = []
    for at in largest.tolist():
        position = int(kept[at])
        if position < first:
            sample_id, name = known[bytes(others.media[position])]
        else:
            sample_id, name = found.ids[position - first].decode(), ""
        gone = [found.ids[row - first].decode() for row in removed[by[removed] == position][:MEMBERS].tolist()]
        selected.shown |= {sample_id: name} | dict.fromkeys(gone, "")
        said.append({"kept": sample_id, "release": name or None, "count": int(counts[at]), "removed": gone})
    return said


def _capped(
    snapshot: Snapshot, rules: Rules, found: _Candidates, rows: np.ndarray, signed: _Signed, selected: Selected
) -> np.ndarray:
    topics = None
    if rules.by_topic:
        topics, selected.said["topics"] = _topics(rules, found, rows, signed)
        selected.shown |= {topic["like"]: "" for topic in selected.said["topics"]}
    values = _values(snapshot, rules.caps, found, topics)
    stay, selected.said["caps"] = apply_caps(rows, rules.caps, values)
    return stay


def _topics(
    rules: Rules, found: _Candidates, rows: np.ndarray, signed: _Signed
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The topic of each candidate, from 1, the largest first, 0 where it has no embedding; and what they are."""
    assert signed.by_embedding is not None
    values, known = (column[signed.earlier :] for column in signed.by_embedding)
    rows = rows[known[rows]]
    of = np.zeros(len(found.ids), np.int64)
    if not len(rows):
        return of, []
    vectors = embeddings(values[rows])
    centres = cells(vectors, rules.topics)
    nearest, distance = np.empty(len(rows), np.int64), np.empty(len(rows))
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        square = (centres**2).sum(axis=1)[None] - 2 * vectors[part].astype(np.float32) @ centres.T
        nearest[part], distance[part] = square.argmin(axis=1), square.min(axis=1)
    counts = np.bincount(nearest, minlength=len(centres))
    order = [cell for cell in np.argsort(-counts, kind="stable").tolist() if counts[cell]]
    said = []
    for number, cell in enumerate(order, 1):
        mine = np.flatnonzero(nearest == cell)
        of[rows[mine]] = number
        like = found.ids[rows[mine[distance[mine].argmin()]]].decode()
        said.append({"topic": number, "samples": len(mine), "like": like})
    return of, said


def _values(snapshot: Snapshot, caps: tuple[Cap, ...], found: _Candidates, topics: np.ndarray | None) -> list[Values]:
    """The values of each cap, of each candidate."""
    order = np.argsort(found.ids)
    expressions = ["caption" if cap.by is None else cap.by for cap in caps if cap.by != TOPIC]
    words = [_patterns(cap.words) for cap in caps if cap.by != TOPIC]
    given: list[list[Any]] = [[None] * len(found.ids) for _ in expressions]
    for batch in evaluate(snapshot.batches, expressions) if expressions else ():
        ids = np.array(batch.column(0).to_pylist(), "S32")
        at = np.minimum(np.searchsorted(found.ids[order], ids), len(order) - 1)
        mine = np.flatnonzero(found.ids[order][at] == ids) if len(order) else np.empty(0, np.int64)
        for column, said in enumerate(given):
            every = batch.column(column + 1).to_pylist()
            for row, place in zip(order[at[mine]].tolist(), mine.tolist(), strict=True):
                said[row] = _words(every[place], words[column]) if words[column] else every[place]
    columns = []
    for cap in caps:
        values = Values()
        if cap.by == TOPIC:
            assert topics is not None
            for topic in topics.tolist():
                values.append(topic or None)
        else:
            for value in given.pop(0):
                values.append(value)
        columns.append(values)
    return columns


def _patterns(words: Iterable[str]) -> dict[str, re.Pattern[str]]:
    """What finds each word, or words in a row, as a whole; in languages without blanks, anywhere."""
    found = {}
    for word in (_plain(word) for word in words):
        parts = re.search(f"[{_UNSPACED}]", word)
        found[word] = re.compile(re.escape(word) if parts else rf"(?<!{_LETTER}){re.escape(word)}(?!{_LETTER})")
    return found


def _words(caption: str | None, words: Mapping[str, re.Pattern[str]]) -> list[str]:
    said = _plain(caption or "")
    return [word for word, whole in words.items() if word in said and whole.search(said)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
