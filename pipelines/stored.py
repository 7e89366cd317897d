"""Samples that exist already, as batches for the stages that look at media."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipelines.resolve import Resolved
from stages.batch import Batch, texts
from stages.read import SUFFIXES

COLUMNS = (
    "sample_id",
    "prompt",
    "plan_json",
    "negative_prompt",
    "tags",
    "extra_json",
    "height",
    "width",
    "num_frames",
    "model_sha256",
    "adapters",
    "media",
    "tensors",
)
"""What of `samples` a batch is made from."""

Row = Mapping[str, Any]


class StoredBatches:
    """Groups stored samples into batches of one media shape, generator and kind of source."""

    def __init__(self, run: Resolved) -> None:
        self._size = run.spec.layout.batch_size
        self._generators = {
            (fact.model_sha256, tuple(adapter["sha256"] for adapter in fact.adapters)): at
            for at, fact in enumerate(run.facts)
        }
        self._groups: dict[tuple[Any, ...], list[tuple[Row, dict[str, Any]]]] = {}

    def source(self, row: Row) -> dict[str, Any] | None:
        """The media of a sample, or else its latents where the spec has the generator that decodes them, or None."""
        for item in row["media"] or ():
            if item["role"] in ("video", "image") and item["mime"] in SUFFIXES:
                return dict(item)
        for item in row["tensors"] or ():
            if item["role"] == "latents" and self._generator(row) is not None:
                return dict(item)
        return None

    def add(self, row: Row, source: dict[str, Any]) -> Batch | None:
        """The batch that this sample fills, if it does."""
        kind = self._generator(row) if "dtype" in source else None
        key = (kind, row["height"], row["width"], row["num_frames"])
        group = self._groups.setdefault(key, [])
        group.append((row, source))
        return self._batch(key) if len(group) == self._size else None

    def rest(self) -> Iterator[Batch]:
        """The batches that were not filled."""
        for key in list(self._groups):
            yield self._batch(key)

    def _generator(self, row: Row) -> int | None:
        return self._generators.get((row["model_sha256"], tuple(item["sha256"] for item in row["adapters"] or ())))

    def _batch(self, key: tuple[Any, ...]) -> Batch:
        group = self._groups.pop(key)
        generator, *shape = key
        blank = [""] * len(group)
        columns: Batch = {
            "sample_id": texts([row["sample_id"] for row, _ in group]),
            "prompt": texts([row["prompt"] or "" for row, _ in group]),
            "plan_json": texts([row["plan_json"] or "{}" for row, _ in group]),
            "negative_prompt": texts([row["negative_prompt"] or "" for row, _ in group]),
            "tags": texts([json.dumps(row["tags"] or []) for row, _ in group]),
            "extra": texts([row["extra_json"] or "{}" for row, _ in group]),
            "source": texts([json.dumps(source) for _, source in group]),
            "generator": np.full(len(group), generator or 0, np.int64),
            "batch_index": np.zeros(len(group), np.int64),
            "error_type": texts(blank),
            "error": texts(blank),
            "error_stage": texts(blank),
        }
        for name, value in zip(("height", "width", "num_frames"), shape, strict=True):
            columns[name] = np.full(len(group), value, np.int64)
        return columns
