"""A release: an immutable, named selection of samples with their latest annotations, as plain Parquet and a manifest.

    releases/<name>/<split>-<number>-<nonce>.parquet        rows, by split, so that readers of file names find the splits
    releases/<name>/media/<split>-<number>-<nonce>.tar      with `pack_bytes`: their media, copied into large tars
    releases/<name>/report-<nonce>.html                     with `rules`: near-duplicates and caps, and what they removed
    releases/<name>/manifest.json                           what it was made from; without it there is no release

The manifest is written last and only if there is none, so a release is there whole or not at all. What a writer that died
has left is removed by the next one of that name. Rows go through part by part: in memory are the annotations, 16 bytes for
each chosen sample, and one part of each split.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.control import Pulse, beating, live_runs
from infra.errors import UserError
from infra.schema import SCHEMA_VERSION
from infra.storage import Storage
from infra.tables import Table
from pipelines.choose import choose
from pipelines.decisions import DECIDED, NONE, apply, read_decisions
from pipelines.idset import IdSet
from pipelines.ranking import left_to_releases
from pipelines.release_report import write_report
from pipelines.repack import File, Hashed, pack
from pipelines.rules import Rules
from pipelines.select import select, told
from pipelines.signatures import Progress

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
DEFAULT_WHERE = "verdict = 'accepted'"
FOLDER = "releases"

PART_ROWS = 20_000
"""Most rows of a Parquet file, and so of a pack."""


@dataclass(frozen=True)
class Released:
    """A release, as its manifest says."""

    name: str
    folder: str
    where: str
    rows: int
    without_media: int
    """Samples that met the condition and are left out: an annotation accepted them after their media were thrown away."""
    counts: Mapping[str, Mapping[str, int]]
    """Rows by split, by verdict and by run."""
    cost: Mapping[str, float]
    """Of the rows: accelerator_seconds and cpu_seconds."""
    licences: tuple[Mapping[str, Any], ...]
    """Of the models that made them, as `runs` has them."""
    packed: bool
    files: tuple[File, ...]
    """path (relative to the dataset's root), nbytes, sha256, and rows of a Parquet file."""
    versions: Mapping[str, int]
    """Table -> the version that it was made from, -1 where there was none."""
    schema_version: int
    ditmill: str
    created_at: str
    selection: Mapping[str, Any] | None = None
    """What near-duplicates and caps have removed (see pipelines.select); None where the release was held to none."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        nbytes = sum(item["nbytes"] for item in self.files)
        splits = ", ".join(f"{count} {split}" for split, count in self.counts["split"].items())
        said = f"{self.folder}: {self.rows} samples ({splits}), {len(self.files)} files, {nbytes:,} bytes"
        for line in told(self.selection or {}):
            said += f"; {line}"
        if self.without_media:
            said += f"; {self.without_media} that were accepted later are left out: their media were not kept"
        return said


def release(
    storage: Storage,
    name: str,
    where: str | None = None,
    pack_bytes: int | None = None,
    rules: Rules | None = None,
    progress: Progress = lambda done, total: None,
) -> Released:
    """Make the release `name`.

    Args:
        storage: the dataset.
        name: a-z, 0-9, - and _; a name is used once.
        where: an SQL condition on a release's columns (see pipelines.choose); left out, verdict = 'accepted'. Withdrawn
            samples are never in it.
        pack_bytes: copy the media into tars of about this many bytes; left out, rows refer to the shards of their runs.
        rules: shares, near-duplicates and caps that it is held to as a whole; shares that the newest run left to releases are
            among them unless they name others, or none (`keep` is {}).
        progress: told how many media were looked at for that, and of how many.

    UserError where the name is taken, the condition is wrong, or no sample meets it.
    """
    from pipelines.resolve import new_run_id

    if not NAME.fullmatch(name):
        raise UserError(
            f"release {name!r}: expected a name of a-z, 0-9, - and _ (loaders stumble over dots in folder names)"
        )
    if pack_bytes is not None and pack_bytes <= 0:
        raise UserError(f"--pack: expected a size above 0, found {pack_bytes}")
    if storage.exists(_manifest(name)):
        raise _taken(name)
    pulse = Pulse(storage, new_run_id())
    try:
        with beating(pulse, "releasing", dict):
            return _release(storage, name, where or DEFAULT_WHERE, pack_bytes, rules, progress, _nonce(pulse.run_id))
    finally:
        pulse.end()


def list_releases(storage: Storage) -> list[Released]:
    """All releases, oldest first."""
    names = [name for name in storage.files(FOLDER) if name.count("/") == 2 and name.endswith("/manifest.json")]
    return sorted((_read(storage, name) for name in names), key=lambda made: (made.created_at, made.name))


def read_release(storage: Storage, name: str) -> Released:
    """One release. UserError where there is none of that name."""
    try:
        return _read(storage, _manifest(name))
    except FileNotFoundError as error:
        there = ", ".join(made.name for made in list_releases(storage)) or "none"
        raise UserError(f"release {name!r}: {storage.root} has no such release; there are: {there}") from error


class Snapshot:
    """One version of the samples, with the decisions of one version of the annotations."""

    def __init__(self, storage: Storage) -> None:
        table, annotations = Table(storage, "samples"), Table(storage, "annotations")
        found, said = table.snapshot(), annotations.snapshot()
        self.versions = {"samples": found.version, "annotations": said.version}
        # Names of parts sort by run and batch: the same dataset gives the same order.
        self._samples = table.dataset(sorted(found.files))
        self._decisions = read_decisions(storage, until=said.version)

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """All samples that are not withdrawn, as decided."""
        for batch in self._samples.to_batches(columns=columns):
            yield apply(batch, self._decisions)

    def chosen(self, ids: IdSet, columns: list[str] | None = None) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Of those with these ids, the ones to release, and how many are left out because their media were not kept.

        `columns`, all where left out, are those that are read: sample_id, verdict and media among them.
        """
        for batch in self._samples.to_batches(columns=columns):
            batch = batch.filter(pa.array(ids.contains(batch.column("sample_id").to_pylist())))
            lost = pa.array(
                [self._lost_media(row) for row in batch.select(["sample_id", "verdict", "media"]).to_pylist()]
            )
            yield apply(batch.filter(pc.invert(lost.cast(pa.bool_()))), self._decisions), pc.sum(lost).as_py() or 0

    def _lost_media(self, row: dict[str, Any]) -> bool:
        if row["verdict"] != "rejected" or self._decisions.get(row["sample_id"], NONE).verdict != "accepted":
            return False
        return all(item["role"] == "preview" for item in row["media"] or ())


def _release(
    storage: Storage,
    name: str,
    where: str,
    pack_bytes: int | None,
    rules: Rules | None,
    progress: Progress,
    nonce: str,
) -> Released:
    from pipelines.resolve import code_version

    _remove_leftovers(storage, name)
    snapshot = Snapshot(storage)
    chosen = choose(snapshot.batches, where)
    if len(chosen) == 0:
        raise UserError(f"where: no sample meets {where!r}; nothing was released")
    if not any(batch.num_rows for batch, _ in snapshot.chosen(chosen, ["sample_id", "verdict", "media"])):
        raise UserError(
            f"where: of the {len(chosen)} samples that meet {where!r} no media were kept; nothing was released"
        )
    rules = rules if rules is not None else Rules()
    if rules.keep is None and (keep := left_to_releases(storage)):
        rules = rules.model_copy(update={"keep": keep})
    selected = select(storage, snapshot, chosen, rules, progress) if rules else None
    writer = _Writer(storage, name, nonce, pack_bytes)
    try:
        without_media = 0
        for batch, lost in snapshot.chosen(chosen):
            if selected is not None:
                batch = batch.filter(pa.array(selected.ids.contains(batch.column("sample_id").to_pylist())))
            writer.add(batch)
            without_media += lost
        writer.close()
        if selected is not None:
            writer.files.append(write_report(storage, snapshot, selected, name, f"{FOLDER}/{name}/report-{nonce}.html"))
        made = Released(
            name=name,
            folder=f"{FOLDER}/{name}",
            where=where,
            rows=sum(writer.counts["split"].values()),
            without_media=without_media,
            counts={key: dict(sorted(count.items())) for key, count in writer.counts.items()},
            cost={key: round(seconds, 4) for key, seconds in writer.cost.items()},
            licences=tuple(_licences(storage, set(writer.counts["run_id"]))),
            packed=pack_bytes is not None,
            files=tuple(writer.files),
            versions=snapshot.versions,
            schema_version=SCHEMA_VERSION,
            ditmill=code_version(),
            created_at=datetime.now(UTC).isoformat(),
            selection=None if selected is None else selected.said,
        )
        if not storage.create_bytes(_manifest(name), json.dumps(made.as_dict(), indent=1).encode()):
            raise _taken(name)
    except BaseException:
        with contextlib.suppress(OSError):
            for file in storage.files(f"{FOLDER}/{name}"):
                if _is_of(file, nonce):
                    storage.delete(file)
        raise
    return made


class _Writer:
    """Rows to files, a part of each split at a time."""

    def __init__(self, storage: Storage, name: str, nonce: str, pack_bytes: int | None) -> None:
        self._storage, self._name, self._nonce, self._pack_bytes = storage, name, nonce, pack_bytes
        self._waiting: dict[str, _Waiting] = {}
        self._numbers: Counter[str] = Counter()
        self.files: list[File] = []
        self.counts: dict[str, Counter[str]] = {"split": Counter(), "verdict": Counter(), "run_id": Counter()}
        self.cost = {"accelerator_seconds": 0.0, "cpu_seconds": 0.0}

    def add(self, batch: pa.RecordBatch) -> None:
        sizes = _member_bytes(batch)
        for split in pc.unique(batch.column("split")).to_pylist():
            mine = pc.equal(batch.column("split"), split)
            waiting = self._waiting.setdefault(split, _Waiting(self._pack_bytes))
            waiting.add(batch.filter(mine), sizes[mine.to_numpy(zero_copy_only=False)])
            while waiting.is_full:
                self._write(split, waiting.take())

    def close(self) -> None:
        for split, waiting in sorted(self._waiting.items()):
            if waiting.rows:
                self._write(split, waiting.take())

    def _write(self, split: str, rows: pa.Table) -> None:
        stem = f"{split}-{self._numbers[split]:05d}-{self._nonce}"
        self._numbers[split] += 1
        if self._pack_bytes is not None:
            rows, file = pack(self._storage, rows, f"{FOLDER}/{self._name}/media/{stem}.tar")
            self.files.append(file)
        path = f"{FOLDER}/{self._name}/{stem}.parquet"
        sink = io.BytesIO()
        pq.write_table(rows.cast(DECIDED), sink, compression="zstd")
        with self._storage.writing(path) as target:
            hashed = Hashed(target)
            hashed.write(sink.getvalue())
        self.files.append({**hashed.entry(path), "rows": rows.num_rows})
        for key, count in self.counts.items():
            count.update(rows[key].to_pylist())
        costs = pc.list_flatten(rows["cost"])
        for key in self.cost:
            self.cost[key] += pc.sum(pc.struct_field(costs, key)).as_py() or 0.0


class _Waiting:
    """Rows of a split that do not fill a part yet."""

    def __init__(self, pack_bytes: int | None) -> None:
        self._pack_bytes = pack_bytes
        self._batches: list[pa.RecordBatch] = []
        self._sizes: list[np.ndarray] = []
        self.rows = self.nbytes = 0

    def add(self, batch: pa.RecordBatch, sizes: np.ndarray) -> None:
        self._batches.append(batch)
        self._sizes.append(sizes)
        self.rows += batch.num_rows
        self.nbytes += int(sizes.sum())

    @property
    def is_full(self) -> bool:
        return self.rows >= PART_ROWS or (self._pack_bytes is not None and self.nbytes >= self._pack_bytes)

    def take(self) -> pa.Table:
        """The rows of the next part; the rest waits."""
        rows, sizes = pa.Table.from_batches(self._batches), np.concatenate(self._sizes)
        count = min(PART_ROWS, len(sizes))
        if self._pack_bytes is not None:
            count = min(count, int(np.searchsorted(np.cumsum(sizes), self._pack_bytes)) + 1)
        self._batches, self._sizes, self.rows, self.nbytes = [], [], 0, 0
        for batch in rows.slice(count).combine_chunks().to_batches():
            self.add(batch, sizes[count:])
        return rows.slice(0, count).combine_chunks()


def _member_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """[n] int64: what the media and tensors of each row take."""
    total = np.zeros(batch.num_rows, np.int64)
    for name in ("media", "tensors"):
        column = batch.column(name)
        sizes = pc.struct_field(pc.list_flatten(column), "nbytes").to_numpy(zero_copy_only=False)
        np.add.at(total, pc.list_parent_indices(column).to_numpy(), sizes.astype(np.int64))
    return total


def _licences(storage: Storage, run_ids: set[str]) -> Iterator[dict[str, Any]]:
    """Each model and licence once, of the runs that made the rows."""
    where = (pc.field("event") == "started") & pc.field("run_id").isin(sorted(run_ids))
    known: set[str] = set()
    for text in Table(storage, "runs").read(["licences_json"], where)["licences_json"].to_pylist():
        for licence in json.loads(text or "[]"):
            key = json.dumps(licence, sort_keys=True)
            if key not in known:
                known.add(key)
                yield licence


def _remove_leftovers(storage: Storage, name: str) -> None:
    """Files of writers of this release that died: there is no manifest, and they do not live."""
    live = {_nonce(beat.run_id) for beat in live_runs(storage) if not beat.is_stale}
    for file in list(storage.files(f"{FOLDER}/{name}")):
        if not file.endswith("/manifest.json") and not any(_is_of(file, nonce) for nonce in live):
            storage.delete(file)


def _read(storage: Storage, manifest: str) -> Released:
    said = json.loads(storage.read_bytes(manifest))
    known = {key: value for key, value in said.items() if key in {field.name for field in fields(Released)}}
    return Released(**known | {"files": tuple(known["files"]), "licences": tuple(known["licences"])})


def _manifest(name: str) -> str:
    return f"{FOLDER}/{name}/manifest.json"


def _nonce(run_id: str) -> str:
    return run_id.rsplit("-", 1)[-1]


def _is_of(file: str, nonce: str) -> bool:
    """Whether the writer with this nonce wrote a file (half-written ones have more after it)."""
    return file.rsplit("/", 1)[-1].split(".", 1)[0].endswith(f"-{nonce}")


def _taken(name: str) -> UserError:
    return UserError(f"release {name!r}: there is one already, and a release never changes; choose another name")
