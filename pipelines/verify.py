"""Checks every promise on the stored bytes: each planned sample is one row or one failure, each reference resolves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.control import live_runs, uncommitted_files
from infra.members import MemberError, read_members
from infra.schema import KEYS, TABLES
from infra.storage import Storage
from infra.tables import Table, dataset_exists, read_dataset_json
from models.noise import noise_key, noise_sha256, standard_normal
from pipelines.enumeration import Enumeration
from pipelines.idset import IdSet
from pipelines.kept import told
from pipelines.release import list_releases
from pipelines.samples import latent_shape

SHOWN = 20
AT_ONCE = 256
AT_ONCE_BYTES = 64 * 2**20
"""Members of shards, and bytes of them, that are asked for at the same time."""
PARTS_AT_ONCE = 32

Broken = dict[str, str]
"""Parts that cannot be read, and why."""


@dataclass(frozen=True)
class Finding:
    """One broken promise. `kind` is a short name, `where` a file or an id."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


def verify(storage: Storage, run_id: str | None = None, read_media: bool = True) -> Iterator[Finding]:
    """Findings, none if every promise holds.

    Args:
        storage: the dataset.
        run_id: read only the media of this run; the tables are always checked whole.
        read_media: also read every media member, and every file of a release, and compare its sha256 (else: its length).
    """
    if not dataset_exists(storage):
        yield Finding("no_dataset", storage.root, "there is no dataset.json")
        return
    broken: Broken = {}
    yield from _parts(storage, broken)
    told = set(broken)
    yield from _duplicates(storage, broken)
    yield from _rows(storage, broken)
    yield from _media(storage, run_id, read_media, broken)
    yield from _distilling(storage, run_id, read_media, broken)
    yield from _planned(storage, broken)
    for path in broken.keys() - told:
        yield Finding("part_broken", path, broken[path])
    if run_id is None:
        yield from _releases(storage, read_media)


def _parts(storage: Storage, broken: Broken) -> Iterator[Finding]:
    """Parts in the log exist, are whole, and have the table's columns; files outside the log belong to a live run."""
    import pyarrow.parquet as pq

    for name in TABLES:
        table = Table(storage, name)
        for path in table.files():
            try:
                with storage.fs.open(storage.path(path), "rb") as file:
                    schema = pq.ParquetFile(file).schema_arrow
            except FileNotFoundError:
                broken[path] = "the log names it and it is not there"
                yield Finding("part_missing", path, broken[path])
                continue
            except ConnectionError:
                raise  # storage that does not answer says nothing about a part
            except Exception as error:
                broken[path] = f"cannot be read as Parquet: {error}"
                yield Finding("part_broken", path, broken[path])
                continue
            lacking = [field.name for field in table.schema if field.name not in schema.names]
            if name == "samples" and lacking:
                yield Finding("part_columns", path, f"lacks {', '.join(lacking)}")
    if broken:
        return  # what a part that is lost referred to cannot be known
    live = _live(storage)
    uncommitted = uncommitted_files(storage)
    live |= _live(storage)  # one may have begun meanwhile
    for path in uncommitted:
        if not any(run in path for run in live):
            kind = "part_not_in_log" if path.endswith(".parquet") else "shard_not_referenced"
            yield Finding(kind, path, "no transaction refers to it; `ditmill vacuum` removes it")


def _live(storage: Storage) -> set[str]:
    return {beat.run_id for beat in live_runs(storage) if not beat.is_stale}


def _duplicates(storage: Storage, broken: Broken) -> Iterator[Finding]:
    """No key stands in two rows."""
    for name in ("samples", "prompts", "sources", "embeddings", "failures", "runs"):
        columns = list(KEYS[name])
        parts = list(_read(storage, name, columns, broken))
        if not parts:
            continue
        rows = pa.concat_tables(parts)
        counts = rows.group_by(columns).aggregate([([], "count_all")])
        twice = counts.filter(pc.greater(counts["count_all"], 1))
        for row in twice.slice(0, SHOWN).to_pylist():
            key = "/".join(str(row[column]) for column in columns)
            yield Finding("doubled_row", f"{name} {key}", f"{row['count_all']} rows")


def _rows(storage: Storage, broken: Broken) -> Iterator[Finding]:
    """Every sample's ids follow from what it says of itself, and its verdict is one."""
    columns = ["sample_id", "recipe", "noise_key", "prompt_id", "sample_index", "seed", "verdict"]
    for row in _each(_read(storage, "samples", columns, broken)):
        if row["verdict"] not in ("accepted", "rejected"):
            yield Finding("verdict", row["sample_id"], f"expected accepted or rejected, found {row['verdict']!r}")
        drawn = row["recipe"] != "curate" and noise_key(row["seed"], row["prompt_id"], row["sample_index"])
        if (drawn or "") != row["noise_key"]:
            yield Finding("noise_key", row["sample_id"], "does not follow from seed, prompt_id and sample_index")


def _media(storage: Storage, run_id: str | None, read: bool, broken: Broken) -> Iterator[Finding]:
    """Every media and tensor reference resolves, and the bytes have the recorded sha256."""
    where = None if run_id is None else pc.field("run_id") == run_id
    columns = ["sample_id", "recipe", "verdict", "media", "tensors"]
    held = _Held(storage, read)
    for row in _each(_read(storage, "samples", columns, broken, where)):
        if row["verdict"] == "accepted" and not row["media"] and row["recipe"] != "prompts":
            yield Finding("media_missing", row["sample_id"], "an accepted sample has no media")
        yield from held.add(f"sample {row['sample_id']}", [*(row["media"] or []), *(row["tensors"] or [])])
    for row in _each(_read(storage, "embeddings", ["text_id", "tensors"], broken, where)):
        yield from held.add(f"text {row['text_id']}", row["tensors"] or [])
    yield from held.rest()


class _Held:
    """References that are held to what is stored: that it is there at once, its bytes many at a time."""

    def __init__(self, storage: Storage, read: bool) -> None:
        self._storage, self._read = storage, read
        self._sizes: dict[str, int | None] = {}
        self._waiting: list[dict[str, Any]] = []

    def add(self, who: str, items: list[dict[str, Any]]) -> Iterator[Finding]:
        for item in items:
            shard = item["shard"]
            if "://" in shard or shard.startswith("/"):
                continue  # media that live elsewhere
            length = self._size(shard)
            end = item["offset"] + item["nbytes"]
            if length is None:
                yield Finding("shard_missing", shard, f"{who} refers to it")
            elif end > length:
                yield Finding("shard_short", shard, f"{who} ends at byte {end}, the shard at {length}")
            elif self._read:
                self._waiting.append(item)
        if len(self._waiting) >= AT_ONCE or sum(item["nbytes"] for item in self._waiting) >= AT_ONCE_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[Finding]:
        yield from _changed(self._storage, self._waiting)
        self._waiting.clear()

    def _size(self, shard: str) -> int | None:
        if shard not in self._sizes:
            try:
                self._sizes[shard] = self._storage.size(shard)
            except FileNotFoundError:
                self._sizes[shard] = None
        return self._sizes[shard]


def _changed(storage: Storage, items: list[dict[str, Any]]) -> Iterator[Finding]:
    """Members of shards whose bytes are not those that were recorded; no other byte is read."""
    for found in read_members(storage, items):
        if isinstance(found, MemberError):
            yield Finding("media_changed", found.where, found.said)


def _distilling(storage: Storage, run_id: str | None, read: bool, broken: Broken) -> Iterator[Finding]:
    """Every text that a sample names is a row of `embeddings`; noise that is drawn again has the recorded sha256."""
    where = None if run_id is None else pc.field("run_id") == run_id
    known = IdSet(
        chunk for part in _read(storage, "embeddings", ["text_id"], broken) for chunk in part["text_id"].chunks
    )
    if broken:
        return  # what a part that is lost held cannot be known
    if not len(known) and read_dataset_json(storage).get("recipe", "synthetic") == "synthetic":
        return  # its rows tell of neither, and their own columns may be large
    columns = ["sample_id", "recipe", "noise_key", "tensors", "plan_json", "extra_json"]
    for row in _each(_read(storage, "samples", columns, broken, where)):
        said = told(row) if row["recipe"] != "synthetic" or len(known) else {}
        named = [said[name] for name in ("text_id", "negative_text_id") if name in said]
        for text_id, found in zip(named, known.contains(named), strict=True):
            if not found:
                yield Finding("text_missing", row["sample_id"], f"its text {text_id} is no row of embeddings")
        shape = latent_shape(row) if read and "noise_sha256" in said else None
        if shape is not None and noise_sha256(standard_normal(row["noise_key"], shape)) != said["noise_sha256"]:
            yield Finding("noise_changed", row["sample_id"], "its noise, drawn again, has not the recorded sha256")


def _planned(storage: Storage, broken: Broken) -> Iterator[Finding]:
    """Every sample that a finished run planned is a row or a failure."""
    ended = [
        row
        for row in _each(_read(storage, "runs", None, broken, pc.field("event") == "ended"))
        if row["plan_file"] and row["planned_through"]
    ]
    if not ended:
        return
    done = IdSet(_ids(storage, ("samples", "failures"), broken))
    if broken:
        return  # what a part that is lost held cannot be known
    checked: dict[tuple[Any, ...], int] = {}
    for row in ended:
        enumeration = enumeration_of(storage, row)
        key = (row["plan_file"], enumeration.samples_per_prompt, enumeration.generator_ids, enumeration.plan_id)
        if checked.get(key, 0) >= row["planned_through"]:
            continue
        checked[key] = row["planned_through"]
        if not storage.exists(row["plan_file"]):
            yield Finding("plan_missing", row["plan_file"], f"run {row['run_id']} planned from it")
            continue
        missing, first = 0, ""
        for chunk in enumeration.chunks():
            ids = chunk.sample_ids[: max(0, row["planned_through"] - chunk.start)]
            if not ids:
                break
            present = done.contains(ids)
            missing += int((~present).sum())
            first = first or next((ids[at] for at in range(len(ids)) if not present[at]), "")
        if missing:
            yield Finding(
                "sample_missing",
                first,
                f"{missing} samples that run {row['run_id']} planned are neither rows nor failures",
            )


def _releases(storage: Storage, read: bool) -> Iterator[Finding]:
    """Every file of every release is as its manifest says."""
    for made in list_releases(storage):
        for item in made.files:
            try:
                if storage.size(item["path"]) == item["nbytes"] and not (
                    read and _sha256(storage, item) != item["sha256"]
                ):
                    continue
                detail = "it is not the file that was released"
            except FileNotFoundError:
                detail = "it is not there"
            yield Finding("release_changed", item["path"], detail)


def _sha256(storage: Storage, item: dict[str, Any]) -> str:
    with storage.reading(item["path"]) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def enumeration_of(storage: Storage, run: dict[str, Any]) -> Enumeration:
    """The enumeration that a row of `runs` planned from."""
    extra = json.loads(run["extra_json"] or "{}")
    spec = json.loads(run["spec_json"])
    return Enumeration(
        storage=storage,
        plan_file=run["plan_file"],
        samples_per_prompt=spec["samples_per_prompt"],
        generator_ids=tuple(extra["generator_ids"]),
        plan_id=extra["plan_id"],
    )


def _read(
    storage: Storage, name: str, columns: list[str] | None, broken: Broken, where: pc.Expression | None = None
) -> Iterator[pa.Table]:
    """A table, some parts at a time, without the broken ones; a part that turns out to be is noted."""
    table = Table(storage, name)
    paths = [path for path in table.files() if path not in broken]
    for at in range(0, len(paths), PARTS_AT_ONCE):
        some = paths[at : at + PARTS_AT_ONCE]
        try:
            read = [table.dataset(some).to_table(columns, where)]
        except ConnectionError:
            raise  # storage that does not answer says nothing about a part
        except (OSError, ValueError):
            read = list(_one_by_one(table, some, columns, broken, where))
        yield from read


def _one_by_one(
    table: Table, paths: list[str], columns: list[str] | None, broken: Broken, where: pc.Expression | None
) -> Iterator[pa.Table]:
    for path in paths:
        try:
            yield table.dataset([path]).to_table(columns, where)
        except ConnectionError:
            raise
        except (OSError, ValueError) as error:
            broken[path] = f"cannot be read: {error}"


def _each(parts: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from part.to_pylist()


def _ids(storage: Storage, names: Iterable[str], broken: Broken) -> Iterator[Any]:
    for name in names:
        for part in _read(storage, name, ["sample_id"], broken):
            yield from part["sample_id"].chunks
