"""A folder that is a dataset of the Hugging Face hub: `load_dataset(folder, config)` gives each config, offline too.

    <out>/README.md                              the card; its header names each config's files by split
    <out>/<config>/<split>-<n:06d>.parquet       n is the chunk's

Configs, each there where the dataset keeps it:

- samples: rows of the release, without the references into the dataset's own shards.
- videos, images: the media as they are stored, of the types Video and Image.
- latents, noise, trajectories: arrays of a fixed shape, Array3D to Array5D.
- embeddings: each distinct text of a split once, by the `text_id` and `negative_text_id` of a sample's `extra_json`;
  prompt_embeds [tokens, width] without padding, and what else a family takes.

All configs of a folder are read by the builder that fits the first one, so that media, too, are columns of Parquet. A config
holds one shape: others go to latents-2 and so on, in the order in which they come.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import replacing
from pipelines.decisions import DECIDED
from pipelines.exporters import Chunk, State, Target, samples_in
from pipelines.exporters.features import Array, Feature, Media, Plain, schema_of, table_of
from pipelines.exporters.hub_card import hub_card
from pipelines.exporters.rows import Role, kept_dtype, kept_media, kept_nbytes, kept_tensor, text_dtype, text_ids
from pipelines.samples import StoredSample

FILE_NBYTES = 512 << 20
MOST_SAMPLES = 10_000
GROUP_NBYTES = 32 << 20
"""Of a row group, and so of a config's rows in memory."""

SMALL_NBYTES = 1024
"""About what the other columns of a row take."""

SAMPLES = {field.name: Plain(field.type) for field in DECIDED if field.name not in ("media", "tensors")}
STRING = Plain(pa.string())
FLOATS = Plain(pa.list_(pa.float64()))

Features = Mapping[str, Feature]
Row = dict[str, Any]


class HubFolder:
    """A Parquet file a chunk for each config and split."""

    def __init__(self, target: Target, state: State) -> None:
        self._target, self._state = target, state
        self._text_dtype = text_dtype(target.storage)
        self._texts: dict[str, set[bytes]] | None = None

    def check(self, sample: StoredSample) -> None:
        """A sample brings what it has."""

    def chunk_samples(self, first: StoredSample) -> int:
        return samples_in(FILE_NBYTES, kept_nbytes(first.row) + SMALL_NBYTES, MOST_SAMPLES)

    def write(self, chunk: Chunk) -> None:
        if self._texts is None:
            self._texts = _texts(self._target.out, chunk.number)
        tasks = set(self._state.get("tasks", ()))
        files: dict[tuple[str, str], _File] = {}
        with ExitStack() as stack:
            for sample in chunk.samples:
                split = str(sample.row["split"])
                for name, features, row in self._rows(sample, split):
                    config = self._config(name, features)
                    if (config, split) not in files:
                        path = self._target.out / config / f"{split}-{chunk.number:06d}.parquet"
                        files[config, split] = stack.enter_context(_File(path, features))
                    files[config, split].add(row)
                    if name in ("videos", "images"):
                        tasks.add(f"{'image' if sample.row['inputs'] else 'text'}-to-{name.removesuffix('s')}")
        self._state["rows"] = chunk.first + len(chunk.samples)
        self._state["tasks"] = sorted(tasks)

    def finish(self) -> None:
        with replacing(self._target.out / "README.md") as file:
            file.write(hub_card(self._target, self._state.get("rows", 0), self._state.get("tasks", ())).encode())

    def _rows(self, sample: StoredSample, split: str) -> Iterator[tuple[str, Features, Row]]:
        """Name, columns and a row of each config that this sample is in."""
        row = sample.row
        yield "samples", SAMPLES, {name: row[name] for name in SAMPLES}
        named = {"sample_id": row["sample_id"], "prompt": row["prompt"]}
        columns: Features = dict.fromkeys(named, STRING)
        if kept_media(row):
            data, suffix = sample.media()
            kind = "video" if suffix == "mp4" else "image"
            media = {"caption": row["caption"], kind: {"bytes": data, "path": f"{row['sample_id']}.{suffix}"}}
            yield f"{kind}s", {**columns, "caption": STRING, kind: Media(kind.capitalize())}, named | media
        kept: tuple[tuple[Role, Callable[[], np.ndarray]], ...] = (("latents", sample.latents), ("noise", sample.noise))
        for role, read in kept:
            if reference := kept_tensor(row, role):
                array = read()
                yield role, {**columns, role: Array(array.shape, kept_dtype(reference))}, named | {role: array}
        if reference := kept_tensor(row, "trajectory"):
            path = sample.trajectory()
            features: dict[str, Feature] = {
                "states": Array(path.states.shape, kept_dtype(reference)),
                "places": Plain(pa.list_(pa.int32())),
                "timesteps": FLOATS,
                "sigmas": FLOATS,
                "steps": Plain(pa.int32()),
            }
            yield "trajectories", {**columns, **features}, named | {name: getattr(path, name) for name in features}
        yield from self._text_rows(sample, split)

    def _text_rows(self, sample: StoredSample, split: str) -> Iterator[tuple[str, Features, Row]]:
        """Those of the sample's texts that its split does not have yet."""
        assert self._texts is not None
        positive, negative = text_ids(sample.row)
        known = self._texts.setdefault(split, set())
        for text_id, text, read in (
            (positive, sample.row["prompt"], sample.text),
            (negative, sample.row["negative_prompt"], sample.negative_text),
        ):
            if text_id and (key := bytes.fromhex(text_id)) not in known:
                arrays = {name: self._as_kept(array) for name, array in sorted(read().items())}
                features = {name: _text_feature(array) for name, array in arrays.items()}
                columns: Features = {"text_id": STRING, "text": STRING, **features}
                yield "embeddings", columns, {"text_id": text_id, "text": text} | arrays
                known.add(key)

    def _as_kept(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self._text_dtype) if array.dtype.kind == "f" else array

    def _config(self, name: str, features: Features) -> str:
        """The config that holds these columns: the name itself, or with a number where it holds others."""
        configs: dict[str, list[str]] = self._state.setdefault("configs", {})
        known = configs.setdefault(name, [])
        told = json.dumps({column: feature.hub() for column, feature in features.items()}, sort_keys=True)
        if told not in known:
            known.append(told)
        number = known.index(told) + 1
        return name if number == 1 else f"{name}-{number}"


class _File:
    """Rows to a Parquet file, a group at a time. It is there once the block ends."""

    def __init__(self, path: Path, features: Features) -> None:
        self._path, self._features = path, features
        self._rows: list[Row] = []
        self._nbytes = 0

    def __enter__(self) -> _File:
        with ExitStack() as stack:
            file = stack.enter_context(replacing(self._path))
            self._writer = stack.enter_context(pq.ParquetWriter(file, schema_of(self._features), compression="zstd"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        self._stack.__exit__(*error)

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self._nbytes += SMALL_NBYTES + sum(_nbytes(value) for value in row.values())
        if self._nbytes >= GROUP_NBYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(table_of(self._rows, self._features))
            self._rows, self._nbytes = [], 0


def _nbytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, bytes) else 0


def _text_feature(array: np.ndarray) -> Feature:
    if array.ndim == 1:
        return Plain(pa.list_(pa.from_numpy_dtype(array.dtype)))
    return Array((None, *array.shape[1:]), str(array.dtype))


def _texts(out: Path, before: int) -> dict[str, set[bytes]]:
    """Ids of the texts that chunks before this one have written, by split: 16 bytes each."""
    found: dict[str, set[bytes]] = {}
    for path in out.glob("embeddings*/*.parquet"):
        split, _, number = path.stem.rpartition("-")
        if int(number) < before:
            ids = pq.read_table(path, columns=["text_id"])["text_id"].to_pylist()
            found.setdefault(split, set()).update(map(bytes.fromhex, ids))
    return found
