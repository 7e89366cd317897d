"""FastVideo's Parquet: what its `fastvideo/dataset/dataloader/schema.py` names, in the folders that its loaders walk.

    combined_parquet_dataset/worker_0/data_chunk_<n>.parquet

Facts of its loaders (`dataset/utils.py`, `parquet_dataset_map_style.py`) and trainers that shape this file:

- Tensors are decoded as float32, whatever `<name>_dtype` says.
- Rows of a folder are stacked: one shape. Text is [tokens, width] without padding; the loader pads it and makes the mask.
- One row is read by decoding its whole row group, so groups are small.
- `vae_latent` is what the autoencoder's encoder gives: trainers apply its mean and std themselves (`normalize_dit_input`),
  so what the denoiser made is scaled back. Trajectories are not: they are trained on as they are.
- A trajectory's state k is what step k made, with the timestep that this step was given: the noise is not in it, and the last
  is the final latent. The trainer picks states by their index, so all steps must be there.
- Columns that it does not know are ignored; ours say where a row comes from.
- The list of files is cached in the folder, so that files that come later would not be seen: the cache is removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.storage import replacing
from pipelines.exporters import Chunk, State, Target, samples_in
from pipelines.exporters.rows import kept_timesteps
from pipelines.samples import StoredSample

FOLDER = "combined_parquet_dataset/worker_0"
CACHES = ("map_style_cache/file_info.pkl", "sharding_info_*/shard_parquet_*.pkl")

FILE_NBYTES = 256 << 20
GROUP_NBYTES = 4 << 20
VALUE_NBYTES = 2**31 - 1
"""Of one value of a binary column."""

Row = dict[str, Any]


def _tensor_fields(name: str) -> list[pa.Field]:
    return [
        pa.field(f"{name}_bytes", pa.binary()),
        pa.field(f"{name}_shape", pa.list_(pa.int64())),
        pa.field(f"{name}_dtype", pa.string()),
    ]


PROVENANCE = [
    pa.field("prompt_id", pa.string()),
    pa.field("noise_key", pa.string()),
    pa.field("negative_prompt", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("split", pa.string()),
    pa.field("model", pa.string()),
    pa.field("model_sha256", pa.string()),
    pa.field("plan_json", pa.string()),
]
"""Columns of ours, as `samples` has them. `id` is the sample_id."""

TEXT_ONLY = pa.schema(
    [pa.field("id", pa.string()), *_tensor_fields("text_embedding"), pa.field("caption", pa.string())]
)
TEXT_TO_VIDEO = pa.schema(
    [
        pa.field("id", pa.string()),
        *_tensor_fields("vae_latent"),
        *_tensor_fields("text_embedding"),
        pa.field("file_name", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("media_type", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_sec", pa.float64()),
        pa.field("fps", pa.float64()),
    ]
)
TRAJECTORY = pa.schema(
    [
        pa.field("id", pa.string()),
        *_tensor_fields("text_embedding"),
        *_tensor_fields("trajectory_latents"),
        *_tensor_fields("trajectory_timesteps"),
        pa.field("file_name", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("media_type", pa.string()),
    ]
)


class FastVideo:
    """What the three have in common: text, provenance, and files of about FILE_NBYTES."""

    fields: ClassVar[pa.Schema]
    tensors: ClassVar[tuple[str, ...]]
    """Roles, one of which each sample must have kept; with none, samples may differ in shape."""

    def __init__(self, target: Target, state: State) -> None:
        self._target, self._state = target, state
        self._schema = pa.schema([*self.fields, *PROVENANCE])
        self._texts = [name for name in self._schema.names if not name.endswith("_bytes")]

    def check(self, sample: StoredSample) -> None:
        if not self.tensors:
            return
        kept = {item["role"] for item in sample.row["tensors"] or ()}
        if kept.isdisjoint(self.tensors):
            raise UserError(
                f"--release: {self._target.release} has samples without {' or '.join(self.tensors)}, such as"
                f" {sample.row['sample_id']} ({sample.row['verdict']}); make a release of those that keep them (of rejected"
                " samples only output.keep_rejected is kept), or a dataset that does"
            )
        shape = {name: sample.row[name] for name in ("height", "width", "num_frames")}
        first = self._state.get("shape", shape)
        self._same("shape", shape, " and ".join(f"{name} = {value}" for name, value in first.items()))

    def chunk_samples(self, first: StoredSample) -> int:
        return samples_in(FILE_NBYTES, _nbytes(self._row(first)))

    def write(self, chunk: Chunk) -> None:
        path = self._target.out / FOLDER / f"data_chunk_{chunk.number}.parquet"
        settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": self._texts, "write_statistics": False}
        with replacing(path) as file, pq.ParquetWriter(file, self._schema, **settings) as writer:
            group: list[Row] = []
            nbytes = 0
            for sample in chunk.samples:
                group.append(self._row(sample))
                nbytes += _nbytes(group[-1])
                if nbytes >= GROUP_NBYTES:
                    writer.write_table(_table(group, self._schema))
                    group, nbytes = [], 0
            if group:
                writer.write_table(_table(group, self._schema))
        for folder in (path.parent.parent, self._target.out):
            for cache in (found for pattern in CACHES for found in folder.glob(pattern)):
                cache.unlink()

    def finish(self) -> None:
        """Each file stands for itself."""

    def _row(self, sample: StoredSample) -> Row:
        row = sample.row
        text = sample.text()["prompt_embeds"]
        self._same("text width", text.shape[1])
        return {
            "id": row["sample_id"],
            **_tensor("text_embedding", text, row),
            "caption": row["prompt"],
            **{field.name: row[field.name] for field in PROVENANCE},
        }

    def _same(self, name: str, value: Any, where: str = "model = ... and plan_id = ...") -> None:
        """Hold a fact of a sample against that of the samples before it."""
        if (known := self._state.setdefault(name, value)) != value:
            raise UserError(
                f"--release: {self._target.release} has samples of {name} {_said(known)} and {_said(value)}, and FastVideo"
                f" stacks what is in a folder; make a release --where \"verdict = 'accepted' and {where}\" and export that"
            )


class TextOnly(FastVideo):
    """`pyarrow_schema_text_only`: a row a sample, so a prompt comes as often as the release has samples of it."""

    fields = TEXT_ONLY
    tensors = ()


class TextToVideo(FastVideo):
    """`pyarrow_schema_t2v`: [C, T, H, W] as the autoencoder's encoder would have given it; an image is one frame."""

    fields = TEXT_TO_VIDEO
    tensors = ("latents", "trajectory")

    def _row(self, sample: StoredSample) -> Row:
        row = sample.row
        latents = encoded(sample.latents(), row)
        self._same("latent shape", list(latents.shape))
        fps, frames = row["fps"] or 0.0, row["num_frames"]
        return super()._row(sample) | {
            **_tensor("vae_latent", latents, row),
            "file_name": row["sample_id"],
            "media_type": "video" if frames > 1 else "image",
            "width": row["width"],
            "height": row["height"],
            "num_frames": latents.shape[1],
            "duration_sec": frames / fps if fps else 0.0,
            "fps": fps,
        }


class Trajectories(FastVideo):
    """`pyarrow_schema_ode_trajectory_text_only`: [1, steps, C, T, H, W] and the [steps] timesteps that led there."""

    fields = TRAJECTORY
    tensors = ("trajectory",)

    def check(self, sample: StoredSample) -> None:
        super().check(sample)
        steps = sample.row["num_inference_steps"]
        self._same("num_inference_steps", steps, f"num_inference_steps = {self._state.get('num_inference_steps')}")
        plan_id = self._state.setdefault("plan_id", sample.row["plan_id"])
        self._same("states at timesteps", kept_timesteps(sample.row), f"plan_id = '{plan_id}'")

    def _row(self, sample: StoredSample) -> Row:
        row = sample.row
        states, timesteps = after_steps(sample)
        self._same("latent shape", list(states.shape))
        self._same("timesteps", timesteps.tolist())
        return super()._row(sample) | {
            **_tensor("trajectory_latents", states[None], row),
            **_tensor("trajectory_timesteps", timesteps, row),
            "file_name": row["sample_id"],
            "media_type": "text",
        }


def encoded(latents: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
    """[C, T, H, W] float32: latents of the denoiser's space in that of the autoencoder, by the constants of the row's plan.

    vae_latents = latents * std / scaling_factor + mean + shift_factor, with std and mean of each channel.
    """
    if latents.ndim == 3:
        latents = latents[:, None]
    try:
        facts = json.loads(row["plan_json"])["latents"]
        std, mean = (np.asarray(facts[name], np.float32).reshape(-1, 1, 1, 1) for name in ("std", "mean"))
        scaling, shift = np.float32(facts["scaling_factor"]), np.float32(facts["shift_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--to: {row['sample_id']} does not record how its latents are scaled (plan_json: latents.std, mean,"
            " scaling_factor, shift_factor), so the autoencoder's own cannot be written; FastVideo trains on these"
        ) from error
    return latents.astype(np.float32) * std / scaling + mean + shift


def after_steps(sample: StoredSample) -> tuple[np.ndarray, np.ndarray]:
    """[steps, *latent_shape] and [steps], float32: what each step made, and the timestep that it was given.

    UserError where a step's state was not kept.
    """
    path = sample.trajectory()
    wanted = tuple(range(1, path.steps + 1))
    at = {place: index for index, place in enumerate(path.places)}
    if missing := [place for place in wanted if place not in at]:
        raise UserError(
            f"--to: fastvideo-ode needs the state after each of {path.steps} steps, and {sample.row['sample_id']} does not"
            f" keep {len(missing)} of them ({', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''});"
            " make the dataset with trajectory.keep: all"
        )
    # A dataset that names its states after the step has not kept the noise, nor its timestep: the plan knows it.
    start = path.timesteps[at[0]] if 0 in at else json.loads(sample.row["plan_json"])["timesteps"][0]
    timesteps = [start, *(path.timesteps[at[place]] for place in wanted[:-1])]
    states = (
        path.states[at[1] :] if len(path.places) == path.steps + (0 in at) else path.states[[at[p] for p in wanted]]
    )
    return states, np.asarray(timesteps, np.float32)


def _tensor(name: str, value: np.ndarray, row: Mapping[str, Any]) -> Row:
    data = np.ascontiguousarray(value, np.float32)
    if data.nbytes > VALUE_NBYTES:
        raise UserError(
            f"--to: {name} of {row['sample_id']} takes {data.nbytes:,} bytes as float32, and a Parquet value at most"
            f" {VALUE_NBYTES:,}; keep fewer states or make smaller samples"
        )
    return {f"{name}_bytes": data.data.cast("B"), f"{name}_shape": list(data.shape), f"{name}_dtype": "float32"}


def _nbytes(row: Row) -> int:
    return sum(value.nbytes for value in row.values() if isinstance(value, memoryview))


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    """The rows; the tensor of a single one is not copied, because a trajectory may be half a gigabyte."""
    columns = []
    for field in schema:
        values = [row[field.name] for row in rows]
        if field.type == pa.binary():
            offsets = np.cumsum([0, *(value.nbytes for value in values)]).astype(np.int32)
            data = values[0] if len(values) == 1 else b"".join(values)
            columns.append(
                pa.Array.from_buffers(field.type, len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
            )
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _said(fact: Any) -> str:
    return "x".join(map(str, fact.values())) if isinstance(fact, dict) else str(fact)[:80]
