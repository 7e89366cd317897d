"""CausVid's LMDB of denoising trajectories, or of clean latents, and the sharded form of it that Self-Forcing reads.

    <out>/lmdb/data.mdb              causvid-lmdb: one environment
    <out>/lmdb/shard_<k>/data.mdb    self-forcing-lmdb: sample i of the export is row i // 16 of shard i % 16

`data_path` of the trainers is <out>/lmdb; Self-Forcing opens whatever lies in it, so nothing else does. Facts of the readers
(`ODERegressionLMDBDataset` in CausVid's causvid/data.py, `ShardingLMDBDataset` in Self-Forcing's utils/dataset.py):

- latents_<i>_data are float16 bytes in C order, prompts_<i>_data UTF-8; latents_shape is "N d1 d2 ..." with the rows counted.
- A row of a trajectory is [S, T, C, H, W], from pure noise to the final latent: what each step starts from, then what the
  last one made. Ours are [S, C, T, H, W]. The trainer pairs states with its denoising steps by their index, and regresses to
  the last. A row of clean latents is [T, C, H, W]: a row of four axes is given a first one of length one.
- A shard without rows still needs its latents_shape.

A row is a sample, whatever its prompt: the builders of these repositories drop prompts that come twice. Keys of ours, which
no reader asks for: ids_<i>_data, the sample_id, and `states`, which says in JSON where on the path the states lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from infra.errors import UserError
from pipelines.exporters import Chunk, State, Target, samples_in
from pipelines.exporters.rows import kept_tensor, kept_timesteps
from pipelines.samples import StoredSample, Trajectory

if TYPE_CHECKING:
    import lmdb

FOLDER = "lmdb"
CHUNK_NBYTES = 128 << 20
"""Of rows that are committed at once: LMDB keeps the pages of a transaction in memory."""

MAP_NBYTES = 256 << 20
"""Of a new environment's map. It is doubled when it is full; the file is as large as its rows."""


class OneLmdb:
    """One environment."""

    shards: ClassVar[int] = 1

    def __init__(self, target: Target, state: State) -> None:
        self._target, self._state = target, state

    def check(self, sample: StoredSample) -> None:
        row = sample.row
        form, reference = "trajectory", kept_tensor(row, "trajectory")
        if reference is None:
            form, reference = "latents", kept_tensor(row, "latents")
        if reference is None:
            raise UserError(
                f"--release: sample {row['sample_id']} ({row['verdict']}) keeps neither a trajectory nor latents; release"
                " accepted samples of a dataset that keeps them (recipe trajectory or reflow, or output.tensors)"
            )
        self._same("tensors", f"{form} of {list(reference['shape'])}", row)
        if form == "trajectory":
            self._same("states at timesteps", kept_timesteps(row), row)

    def chunk_samples(self, first: StoredSample) -> int:
        reference = kept_tensor(first.row, "trajectory") or kept_tensor(first.row, "latents")
        return samples_in(CHUNK_NBYTES, 2 * int(np.prod(reference["shape"])) if reference else 0)

    def write(self, chunk: Chunk) -> None:
        ends = chunk.first + len(chunk.samples)
        for shard in range(self.shards):
            rows = [
                (at // self.shards, sample)
                for at, sample in enumerate(chunk.samples, chunk.first)
                if at % self.shards == shard
            ]
            if rows or chunk.number == 0:
                self._commit(shard, rows, count=-(-(ends - shard) // self.shards))

    def finish(self) -> None:
        """Each commit left the environments whole."""

    def _commit(self, shard: int, rows: Sequence[tuple[int, StoredSample]], count: int) -> None:
        """Rows of a shard and how many it has then, all or nothing."""
        import lmdb

        with self._environment(shard) as environment:
            while True:
                try:
                    with environment.begin(write=True) as transaction:
                        for at, sample in rows:
                            latents, prompt = self._row(sample), str(sample.row["prompt"])
                            transaction.put(f"latents_{at}_data".encode(), latents.data)
                            transaction.put(f"prompts_{at}_data".encode(), prompt.encode())
                            transaction.put(f"ids_{at}_data".encode(), str(sample.row["sample_id"]).encode())
                        shape = [count, *self._state["row_shape"]]
                        transaction.put(b"latents_shape", " ".join(map(str, shape)).encode())
                        transaction.put(b"prompts_shape", str(count).encode())
                        transaction.put(b"ids_shape", str(count).encode())
                        transaction.put(b"states", json.dumps(self._state["states"]).encode())
                    return
                except lmdb.MapFullError:
                    environment.set_mapsize(2 * environment.info()["map_size"])

    @contextmanager
    def _environment(self, shard: int) -> Iterator[lmdb.Environment]:
        import lmdb

        path = self._folder(shard)
        path.mkdir(parents=True, exist_ok=True)
        environment = lmdb.open(str(path), map_size=MAP_NBYTES, lock=False)  # the export has locked its whole folder
        try:
            yield environment
        finally:
            environment.close()

    def _folder(self, shard: int) -> Path:
        return self._target.out / FOLDER

    def _row(self, sample: StoredSample) -> np.ndarray:
        """[S, T, C, H, W], or [T, C, H, W], float16."""
        row = sample.row
        if kept_tensor(row, "trajectory"):
            path = from_noise(sample)
            latents = _time_first(path.states)
            self._same("states", _places(path), row)
        else:
            latents = _time_first(sample.latents()[None])[0]
            self._same("states", None, row)
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(latents, dtype="<f2")
        if not np.isfinite(half).all():
            raise UserError(
                f"--to: sample {row['sample_id']} has a value of {np.abs(latents).max():g}, and this format's float16 ends at"
                " 65504; leave the sample out of the release"
            )
        self._same("row_shape", list(half.shape), row)
        return half

    def _same(self, name: str, value: Any, row: Mapping[str, Any]) -> None:
        """Hold a fact of a sample to what it was of all before it."""
        if (known := self._state.setdefault(name, value)) != value:
            where = f"height = {row['height']} and width = {row['width']} and num_frames = {row['num_frames']}"
            raise UserError(
                f"--release: {self._target.release} has samples of {name} {str(known)[:80]} and {str(value)[:80]}, and an"
                f" LMDB is of one kind; make a release --where \"verdict = 'accepted' and {where} and"
                f" plan_id = '{row['plan_id']}'\" and export that"
            )


class ShardedLmdb(OneLmdb):
    """16 environments, as `create_lmdb_14b_shards.py` makes them."""

    shards: ClassVar[int] = 16

    def _folder(self, shard: int) -> Path:
        return super()._folder(shard) / f"shard_{shard}"


def from_noise(sample: StoredSample) -> Trajectory:
    """The kept states of a sample's path, with the noise before them and the final latent after them where these were not
    kept. `timesteps` and `sigmas` of an added noise are NaN: only the scheduler knows them."""
    path = sample.trajectory()
    if path.places[0] != 0:
        path = Trajectory(
            states=np.concatenate([sample.noise()[None], path.states]),
            places=(0, *path.places),
            timesteps=(math.nan, *path.timesteps),
            sigmas=(math.nan, *path.sigmas) if path.sigmas else (),
            steps=path.steps,
        )
    if path.places[-1] != path.steps:
        path = Trajectory(
            states=np.concatenate([path.states, sample.latents()[None]]),
            places=(*path.places, path.steps),
            timesteps=(*path.timesteps, 0.0),
            sigmas=(*path.sigmas, 0.0) if path.sigmas else (),
            steps=path.steps,
        )
    return path


def _places(path: Trajectory) -> dict[str, Any]:
    """Where states lie on their path, as JSON has it: null for what is not known."""
    known = {
        name: [None if math.isnan(value) else value for value in values]
        for name, values in (("timesteps", path.timesteps), ("sigmas", path.sigmas))
    }
    return {"places": list(path.places), "num_inference_steps": path.steps, **known}


def _time_first(states: np.ndarray) -> np.ndarray:
    """[S, C, T, H, W], or images' [S, C, H, W], as [S, T, C, H, W]."""
    return states[:, None] if states.ndim == 4 else states.swapaxes(1, 2)
