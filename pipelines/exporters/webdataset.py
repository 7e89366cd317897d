"""WebDataset: tars of samples, for any loader that streams them.

    <out>/<split>-<n:06d>.tar

    <sample_id>.mp4 | png | webp      the media as they are stored
    <sample_id>.txt                   the caption, or the prompt where there is none
    <sample_id>.json                  where it comes from: the same keys and types in each
    <sample_id>.latent.npy            the final latent, [C, T, H, W] or [C, H, W]
    <sample_id>.noise.npy             what it started from, of the same shape
    <sample_id>.trajectory.npy        states of its path [S, *latent_shape], and
    <sample_id>.trajectory.json       their places, timesteps and sigmas, as pipelines.samples.Trajectory names them
    <sample_id>.text.npy              prompt_embeds [tokens, width] without padding; what else a family takes comes by its
                                      name without underscores, such as <sample_id>.pooledpromptembeds.npy

Each where the dataset keeps it. A loader takes what is before a name's first dot as the sample's key and decodes by what is
after its last one. Numbers of a split have no gaps, so that `train-{000000..000041}.tar` names all of them. The same release
gives the same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from infra.shard import TarWriter
from infra.storage import replacing
from pipelines.exporters import Chunk, State, Target, samples_in
from pipelines.exporters.rows import kept_dtype, kept_media, kept_nbytes, kept_tensor, text_dtype, text_ids
from pipelines.samples import StoredSample
from stages.write import SIDECAR

SHARD_NBYTES = 256 << 20
MOST_SAMPLES = 10_000
"""Of a shard, however small they are."""

SMALL_MEMBERS_NBYTES = 4096
"""What .json and .txt take in a tar, headers and padding included."""

PROVENANCE = (
    *SIDECAR, "recipe", "verdict", "prompt_id", "num_inference_steps", "guidance_scale", "plan_json", "run_id", "extra_json",
)  # fmt: skip


class Shards:
    """A tar for each split of a chunk."""

    def __init__(self, target: Target, state: State) -> None:
        self._target, self._state = target, state
        self._text_dtype = text_dtype(target.storage)

    def check(self, sample: StoredSample) -> None:
        """A sample brings what it has."""

    def chunk_samples(self, first: StoredSample) -> int:
        return samples_in(SHARD_NBYTES, kept_nbytes(first.row) + SMALL_MEMBERS_NBYTES, MOST_SAMPLES)

    def write(self, chunk: Chunk) -> None:
        shards: dict[str, int] = self._state.get("shards", {})
        for split in sorted({str(sample.row["split"]) for sample in chunk.samples}):
            number = shards.get(split, 0)
            with replacing(self._target.out / f"{split}-{number:06d}.tar") as file:
                tar = TarWriter(file)
                for sample in chunk.samples:
                    if sample.row["split"] == split:
                        for suffix, data in sorted(self._members(sample)):
                            tar.add(f"{sample.row['sample_id']}.{suffix}", data)
                tar.close()
            shards = shards | {split: number + 1}
        self._state["shards"] = shards

    def finish(self) -> None:
        """A tar stands for itself."""

    def _members(self, sample: StoredSample) -> Iterator[tuple[str, bytes]]:
        """Suffix and bytes of each member."""
        row = sample.row
        yield "json", _provenance(sample)
        yield "txt", str(row["caption"] or row["prompt"]).encode()
        if kept_media(row):
            data, suffix = sample.media()
            yield suffix, data
        if reference := kept_tensor(row, "latents"):
            yield "latent.npy", _npy(sample.latents().astype(kept_dtype(reference)))
        if reference := kept_tensor(row, "noise"):
            yield "noise.npy", _npy(sample.noise().astype(kept_dtype(reference)))
        if reference := kept_tensor(row, "trajectory"):
            path = sample.trajectory()
            yield "trajectory.npy", _npy(path.states.astype(kept_dtype(reference)))
            told = {"places": path.places, "timesteps": path.timesteps, "sigmas": path.sigmas, "steps": path.steps}
            yield "trajectory.json", orjson.dumps(told, option=orjson.OPT_SORT_KEYS)
        if text_ids(row)[0]:
            for name, array in sample.text().items():
                kept = array.astype(self._text_dtype) if array.dtype.kind == "f" else array
                yield "text.npy" if name == "prompt_embeds" else f"{name.replace('_', '')}.npy", _npy(kept)


def _provenance(sample: StoredSample) -> bytes:
    said: dict[str, Any] = {key: sample.row[key] for key in PROVENANCE}
    said["adapters_json"] = json.dumps(sample.row["adapters"] or [], sort_keys=True)
    return orjson.dumps(said, option=orjson.OPT_SORT_KEYS)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
