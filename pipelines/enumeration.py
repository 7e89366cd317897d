"""The fixed enumeration of a run's samples, and its grouping into batches.

A plan file holds the resolved prompts in order. Samples are enumerated by sample index, then by groups of prompts, then by
generator, so that any prefix is spread over prompts and generators alike. What `samples_per_prompt` adds comes last, so a
larger value keeps the old prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.schema import PROMPTS
from infra.storage import Storage
from models.noise import noise_key
from pipelines.identity import sample_ids
from stages.batch import Batch, texts

CHUNK = 4096

PLANNED = pa.schema([field for field in PROMPTS if field.name not in ("run_id", "created_at")])
"""Columns of a plan file."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of the enumeration: one for each row of `prompts`."""

    start: int
    prompts: pa.RecordBatch
    sample_index: int
    generator: int
    sample_ids: list[str]


@dataclass(frozen=True)
class Enumeration:
    """All samples of one resolved spec, in order."""

    storage: Storage
    plan_file: str
    samples_per_prompt: int
    generator_ids: tuple[str, ...]
    plan_id: str

    def __len__(self) -> int:
        with self._open() as file:
            return int(file.metadata.num_rows) * self.samples_per_prompt * len(self.generator_ids)

    def chunks(self) -> Iterator[Chunk]:
        start = 0
        for sample_index in range(self.samples_per_prompt):
            with self._open() as file:
                for prompts in file.iter_batches(CHUNK):
                    ids = prompts.column("prompt_id").to_pylist()
                    for generator, generator_id in enumerate(self.generator_ids):
                        found = sample_ids(ids, sample_index, generator_id, self.plan_id)
                        yield Chunk(start, prompts, sample_index, generator, found)
                        start += len(ids)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.storage.fs.open(self.storage.path(self.plan_file), "rb"))


@dataclass(frozen=True)
class Planned:
    """Samples to make, of one generator and one media shape, in the order of the enumeration.

    `places` are their indices in the enumeration; `prompts` has a row for each of them.
    """

    places: np.ndarray
    sample_ids: np.ndarray
    sample_index: np.ndarray
    prompts: pa.Table
    generator: int

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, start: int, stop: int | None = None) -> Planned:
        part = slice(start, stop)
        return Planned(
            self.places[part],
            self.sample_ids[part],
            self.sample_index[part],
            self.prompts.slice(start, None if stop is None else stop - start),
            self.generator,
        )

    def then(self, more: Planned) -> Planned:
        return Planned(
            np.concatenate([self.places, more.places]),
            np.concatenate([self.sample_ids, more.sample_ids]),
            np.concatenate([self.sample_index, more.sample_index]),
            pa.concat_tables([self.prompts, more.prompts]),
            self.generator,
        )


class Batches:
    """Batches of the samples that are still to do: each of one generator and one media shape.

    Args:
        enumeration: where samples come from.
        is_done: ids -> boolean array, true for samples that need no work.
        batch_size: samples in a full batch.
        attempts: attempt number for samples that failed before.
        seed: the spec's seed.
        limit: take no more than this prefix of the enumeration.
    """

    def __init__(
        self,
        enumeration: Enumeration,
        is_done: Callable[[list[str]], np.ndarray],
        batch_size: int,
        attempts: dict[str, int],
        seed: int,
        limit: int | None = None,
    ) -> None:
        self._enumeration, self._is_done = enumeration, is_done
        self._batch_size, self._attempts, self._seed, self._limit = batch_size, attempts, seed, limit
        self._waiting: dict[tuple[int, ...], Planned] = {}
        self._consumed = 0
        self.samples = 0

    @property
    def planned_through(self) -> int:
        """Every sample before this place has been handed out or needed no work."""
        return min([self._consumed, *(int(planned.places[0]) for planned in self._waiting.values())])

    def __iter__(self) -> Iterator[Batch]:
        for chunk in self._enumeration.chunks():
            for key, planned in self._todo(chunk):
                self._waiting[key] = self._waiting[key].then(planned) if key in self._waiting else planned
            while full := self._full():
                yield self._batch(full)
            if self._consumed == self._limit:
                break
        for key in sorted(self._waiting, key=lambda key: int(self._waiting[key].places[0])):
            yield self._batch(key)

    def _todo(self, chunk: Chunk) -> Iterator[tuple[tuple[int, ...], Planned]]:
        """What is to do of a chunk, by generator and media shape."""
        count = len(chunk.sample_ids)
        if self._limit is not None:
            count = min(count, self._limit - chunk.start)
        self._consumed = chunk.start + count
        rows = np.flatnonzero(~self._is_done(chunk.sample_ids)[:count])
        if len(rows) == 0:
            return
        ids = texts(chunk.sample_ids)
        prompts = pa.Table.from_batches([chunk.prompts])
        columns = [prompts[name].to_numpy()[rows] for name in ("height", "width", "num_frames")]
        shapes, kind = np.unique(np.stack(columns), axis=1, return_inverse=True)
        for number, shape in enumerate(shapes.T.tolist()):
            of_shape = rows[kind.reshape(-1) == number]
            yield (
                (chunk.generator, *shape),
                Planned(
                    places=chunk.start + of_shape,
                    sample_ids=ids[of_shape],
                    sample_index=np.full(len(of_shape), chunk.sample_index, np.int64),
                    prompts=prompts.take(of_shape),
                    generator=chunk.generator,
                ),
            )

    def _full(self) -> tuple[int, ...] | None:
        """The group that was the first to be full."""
        last = self._batch_size - 1
        full = [(int(group.places[last]), key) for key, group in self._waiting.items() if len(group) > last]
        return min(full)[1] if full else None

    def _batch(self, key: tuple[int, ...]) -> Batch:
        group = self._waiting.pop(key)
        if len(group) > self._batch_size:
            self._waiting[key] = group.rows(self._batch_size)
        handed = group.rows(0, self._batch_size)
        self.samples += len(handed)
        return planned_batch(handed, self._seed, self._attempts)


def planned_batch(group: Planned, seed: int, attempts: dict[str, int]) -> Batch:
    """The columns that a batch of planned samples starts with (see stages.batch)."""
    column = {name: group.prompts[name].to_pylist() for name in PLANNED.names}
    seeds = [seed if own is None else own for own in column["seed"]]
    keys = map(noise_key, seeds, column["prompt_id"], group.sample_index.tolist())
    count = len(group)
    columns: Batch = {
        "sample_id": group.sample_ids,
        "noise_key": texts(list(keys)),
        "tags": _lists(column["tags"]),
        "inputs": _lists(column["inputs"]),
        "extra": texts(list(map(_extra, column["extra_json"], column["variant"], column["licence"]))),
        "sample_index": group.sample_index,
        "generator": np.full(count, group.generator, np.int64),
        "seed": np.array(seeds, np.int64),
        "fps": np.array(column["fps"], np.float64),
        "attempt": np.array([attempts.get(sample_id, 1) for sample_id in group.sample_ids], np.int64),
        "batch_index": np.zeros(count, np.int64),
    }
    for name in ("prompt_id", "source_prompt", "prompt", "negative_prompt", "licence"):
        columns[name] = texts([value or "" for value in column[name]])
    for name in ("height", "width", "num_frames"):
        columns[name] = np.array(column[name], np.int64)
    for name in ("error_type", "error", "error_stage"):
        columns[name] = texts([""] * count)
    return columns


def _lists(values: list[list[Any] | None]) -> np.ndarray:
    return texts([json.dumps(value, ensure_ascii=False) if value else "[]" for value in values])


@lru_cache(1024)
def _extra(extra_json: str | None, variant: int, licence: str | None) -> str:
    """Most prompts have the same: nothing."""
    extra = json.loads(extra_json or "{}")
    extra["variant"] = variant
    if licence:
        extra["licence"] = licence
    return json.dumps(extra, ensure_ascii=False)
