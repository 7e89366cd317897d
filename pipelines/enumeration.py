"""The fixed enumeration of a run's samples, and its grouping into batches.

A plan file holds the resolved prompts in order. Samples are enumerated by sample index, then by groups of prompts, then by
generator, so that any prefix is spread over prompts and generators alike. What `samples_per_prompt` adds comes last, so a
larger value keeps the old prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.schema import PROMPTS
from infra.storage import Storage
from models.noise import noise_key
from pipelines.identity import sample_ids
from stages.batch import Batch, jsons, texts

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
    """One sample to make, and its place in the enumeration."""

    index: int
    prompts: pa.RecordBatch
    row: int
    sample_index: int
    generator: int
    sample_id: str


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
        self._groups: dict[tuple[Any, ...], list[Planned]] = {}
        self._consumed = 0
        self.samples = 0

    @property
    def planned_through(self) -> int:
        """Every sample before this place has been handed out or needed no work."""
        waiting = [group[0].index for group in self._groups.values() if group]
        return min([self._consumed, *waiting])

    def __iter__(self) -> Iterator[Batch]:
        for sample in self._todo():
            key = (sample.generator, *_shape(sample))
            group = self._groups.setdefault(key, [])
            group.append(sample)
            if len(group) == self._batch_size:
                yield self._batch(key)
        for key in list(self._groups):
            yield self._batch(key)

    def _todo(self) -> Iterator[Planned]:
        for chunk in self._enumeration.chunks():
            done = self._is_done(chunk.sample_ids)
            for row, sample_id in enumerate(chunk.sample_ids):
                if self._limit is not None and chunk.start + row >= self._limit:
                    return
                self._consumed = chunk.start + row + 1
                if not done[row]:
                    yield Planned(chunk.start + row, chunk.prompts, row, chunk.sample_index, chunk.generator, sample_id)

    def _batch(self, key: tuple[Any, ...]) -> Batch:
        group = self._groups.pop(key)
        self.samples += len(group)
        return planned_batch(group, self._seed, self._attempts)


def planned_batch(group: list[Planned], seed: int, attempts: dict[str, int]) -> Batch:
    """The columns that a batch of planned samples starts with (see stages.batch)."""
    rows = [sample.prompts.slice(sample.row, 1).to_pylist()[0] for sample in group]
    seeds = [seed if row["seed"] is None else row["seed"] for row in rows]
    keys = [
        noise_key(at, row["prompt_id"], sample.sample_index) for at, row, sample in zip(seeds, rows, group, strict=True)
    ]
    columns: Batch = {
        "sample_id": texts([sample.sample_id for sample in group]),
        "noise_key": texts(keys),
        "tags": jsons([row["tags"] or [] for row in rows]),
        "inputs": jsons([row["inputs"] or [] for row in rows]),
        "extra": texts([_extra(row) for row in rows]),
        "sample_index": np.array([sample.sample_index for sample in group], np.int64),
        "generator": np.array([sample.generator for sample in group], np.int64),
        "seed": np.array(seeds, np.int64),
        "fps": np.array([row["fps"] for row in rows], np.float64),
        "attempt": np.array([attempts.get(sample.sample_id, 1) for sample in group], np.int64),
        "batch_index": np.zeros(len(group), np.int64),
    }
    for name in ("prompt_id", "source_prompt", "prompt", "negative_prompt", "licence"):
        columns[name] = texts([row[name] or "" for row in rows])
    for name in ("height", "width", "num_frames"):
        columns[name] = np.array([row[name] for row in rows], np.int64)
    for name in ("error_type", "error", "error_stage"):
        columns[name] = texts([""] * len(group))
    return columns


def _shape(sample: Planned) -> tuple[int, int, int]:
    at = sample.row
    height, width, frames = (sample.prompts.column(name)[at].as_py() for name in ("height", "width", "num_frames"))
    return height, width, frames


def _extra(row: dict[str, Any]) -> str:
    extra = json.loads(row["extra_json"] or "{}")
    extra["variant"] = row["variant"]
    if row["licence"]:
        extra["licence"] = row["licence"]
    return json.dumps(extra, ensure_ascii=False)
