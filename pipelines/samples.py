"""Samples of a release with their tensors, as exporters and trainers read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.members import read_member
from infra.shard import read_arrays, read_safetensors
from infra.storage import Storage
from infra.tables import Table
from models.noise import noise_sha256, standard_normal
from pipelines.idset import IdSet
from pipelines.kept import told
from pipelines.release import Released, read_release

TEXTS_HELD = 32
"""Embeddings of texts that a process keeps in memory: most samples share their negative prompt."""


@dataclass(frozen=True)
class Trajectory:
    """Chosen states of the path that a teacher of N steps took from noise to the final latent.

    A state's place is named before the step: 0 is pure noise, k is what step k starts from, N the final latent.
    """

    states: np.ndarray
    """[S, *latent_shape] float32."""
    places: tuple[int, ...]
    """Of each state, ascending, 0 to N."""
    timesteps: tuple[float, ...]
    """That the denoiser is given at each state; 0 at the final latent."""
    sigmas: tuple[float, ...]
    """Share of noise in each state, 0 at the final latent; empty where the scheduler is no flow's."""
    steps: int
    """N."""


@dataclass(frozen=True)
class StoredSample:
    """One row of a release, and what it refers to. Each method reads storage anew, but for the last texts."""

    storage: Storage
    row: Mapping[str, Any]
    """Columns of pipelines.decisions.DECIDED."""

    def latents(self) -> np.ndarray:
        """The final latent, float32 of the row's latent shape: "C T H W", images "C H W"."""
        if self._tensor("latents") is None and self._tensor("trajectory") is not None:
            path = self.trajectory()
            if path.places[-1] == path.steps:
                return path.states[-1]
        return self._array("latents")

    def noise(self) -> np.ndarray:
        """The noise it started from, float32 of the same shape, drawn from its key and held to its recorded sha256."""
        noise = standard_normal(self.row["noise_key"], self._latent_shape)
        said = self._told.get("noise_sha256")
        if said is not None and noise_sha256(noise) != said:
            raise UserError(f"sample {self._id}: its noise, drawn again, has not the recorded sha256; `ditmill verify`")
        return noise

    def trajectory(self) -> Trajectory:
        """The kept states of its path. UserError where the dataset keeps none."""
        states = self._array("trajectory")
        said = self._told["trajectory"]
        return Trajectory(
            states=states,
            places=tuple(said["places"]),
            timesteps=tuple(said["timesteps"]),
            sigmas=tuple(said["sigmas"]),
            steps=int(said["steps"]),
        )

    def text(self) -> Mapping[str, np.ndarray]:
        """What the denoiser was conditioned on, unpadded: `prompt_embeds` [tokens, width] float32 and whatever else its
        family takes, by the pipeline's argument, without the batch axis. UserError where the dataset keeps none."""
        if (text_id := self._told.get("text_id")) is None:
            raise self._lacks("text_embeddings")
        return _text(self.storage, text_id)

    def negative_text(self) -> Mapping[str, np.ndarray]:
        """The same of its negative prompt, by the same names (no prefix); empty where it was sampled without guidance."""
        text_id = self._told.get("negative_text_id")
        return {} if text_id is None else _text(self.storage, text_id)

    def media(self) -> tuple[bytes, str]:
        """The encoded media and its suffix: mp4, webp or png. UserError where there is none (recipe prompts)."""
        item = next((item for item in self.row["media"] or () if item["role"] != "preview"), None)
        if item is None:
            raise UserError(f"sample {self._id}: has no media; its recipe, or output.keep_rejected, keeps none")
        return read_member(self.storage, item), item["member"].rpartition(".")[2]

    @property
    def _id(self) -> str:
        return str(self.row["sample_id"])

    @cached_property
    def _told(self) -> dict[str, Any]:
        return told(self.row)

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        shape = latent_shape(self.row)
        if shape is None:
            raise UserError(
                f"sample {self._id}: has no latents; its pipeline runs whole, or its recipe samples nothing"
            )
        return shape

    def _tensor(self, role: str) -> Mapping[str, Any] | None:
        return next((item for item in self.row["tensors"] or () if item["role"] == role), None)

    def _array(self, role: str) -> np.ndarray:
        item = self._tensor(role)
        if item is None:
            raise self._lacks(role)
        return read_safetensors(read_member(self.storage, item), role)

    def _lacks(self, role: str) -> UserError:
        key = "trajectory.keep" if role == "trajectory" else f"output.tensors.{role}"
        return UserError(f"sample {self._id}: {role} are not stored; make a dataset with {key}")


def latent_shape(row: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of a sample's latents and noise, as its row says; None where it has none."""
    for item in row["tensors"] or ():
        if item["role"] in ("latents", "noise"):
            return tuple(item["shape"])
        if item["role"] == "trajectory":
            return tuple(item["shape"][1:])
    said = _planned_shape(row["plan_json"] or "{}")
    return None if said is None else tuple(said)


def read_samples(
    storage: Storage, release: str, *, since: tuple[str, ...] = (), rank: int = 0, world: int = 1
) -> Iterator[StoredSample]:
    """Samples of a release in its own fixed order, a file of rows at a time in memory.

    `since` leaves out those that are in one of these releases too. Of `world` readers each takes every `world`-th sample.
    UserError where there is no release of that name.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 to {world - 1}, found {rank}")
    known = IdSet(ids for name in since for ids in _ids(storage, read_release(storage, name)))
    before = 0
    for path in _parts(read_release(storage, release)):
        with storage.fs.open(storage.path(path), "rb") as file:
            rows = pq.read_table(file)
        new = np.flatnonzero(~known.contains(rows["sample_id"].to_pylist()))
        mine = new[(before + np.arange(len(new))) % world == rank]
        before += len(new)
        for batch in rows.take(mine).to_batches(max_chunksize=256):
            for row in batch.to_pylist():
                yield StoredSample(storage, row)


def _parts(release: Released) -> list[str]:
    return [item["path"] for item in release.files if item["path"].endswith(".parquet")]


def _ids(storage: Storage, release: Released) -> Iterator[pa.Array]:
    for path in _parts(release):
        with storage.fs.open(storage.path(path), "rb") as file:
            yield from pq.read_table(file, columns=["sample_id"])["sample_id"].chunks


@lru_cache(maxsize=256)
def _planned_shape(plan_json: str) -> list[int] | None:
    latents = json.loads(plan_json).get("latents")
    return latents["shape"] if isinstance(latents, dict) else None


class _Texts:
    """Where the embeddings of texts lie, by id."""

    def __init__(self, storage: Storage) -> None:
        rows = Table(storage, "embeddings").read(["text_id", "tensors"])
        self._at = {text_id: at for at, text_id in enumerate(rows["text_id"].to_pylist())}
        self._tensors = rows["tensors"].combine_chunks()

    def find(self, text_id: str) -> Mapping[str, Any] | None:
        at = self._at.get(text_id)
        return None if at is None else self._tensors[at].as_py()[0]


_texts: dict[Storage, _Texts] = {}


@lru_cache(maxsize=TEXTS_HELD)
def _text(storage: Storage, text_id: str) -> Mapping[str, np.ndarray]:
    item = _texts[storage].find(text_id) if storage in _texts else None
    if item is None:
        _texts[storage] = _Texts(storage)  # it may have been committed since
        item = _texts[storage].find(text_id)
    if item is None:
        raise UserError(f"text {text_id}: is not in `embeddings`; `ditmill verify` lists what else is missing")
    arrays = read_arrays(read_member(storage, item))
    for array in arrays.values():
        array.setflags(write=False)
    return arrays
