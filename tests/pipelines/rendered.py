"""Datasets of rendered clips, stored as a run stores them, and of copies that are nearly the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.commit import Committer, write_part
from infra.media import decode, encode
from infra.schema import SAMPLES
from infra.shard import build_tar
from infra.storage import Storage
from infra.tables import Table
from models.pack.grammar import sample_scenes
from models.pack.world import render
from pipelines.release import Released
from pipelines.rules import Rules


@cache
def scenes() -> np.ndarray:
    """Clips uint8 [12, 17, 64, 64, 3] of as many scenes; not to be written to."""
    return render(sample_scenes(np.random.default_rng(1), 12), range(12))


def shifted(frames: np.ndarray) -> np.ndarray:
    return np.concatenate([frames[:, :, :1], frames[:, :, :-1]], axis=2)


def brighter(frames: np.ndarray) -> np.ndarray:
    return np.clip(frames.astype(int) + 10, 0, 255).astype(np.uint8)


def again(frames: np.ndarray) -> np.ndarray:
    return decode(encode(frames, 8.0, crf=28).data, "mp4")


def sample_id(name: str) -> str:
    return hashlib.md5(name.encode()).hexdigest()


def store(storage: Storage, clips: dict[str, np.ndarray], run: str = "a", **columns: Sequence[Any]) -> None:
    """Rows with their media in one shard, by name; `score` is that of prompt_match."""
    run_id = f"20260101t000000-{run * 6}"
    encoded = {name: encode(frames, 8.0) for name, frames in clips.items()}
    members = [(f"{sample_id(name)}.{one.suffix}", one.data) for name, one in encoded.items()]
    data, places = build_tar(members)
    shard = f"media/{run_id}/0.tar"
    storage.write_bytes(shard, data)
    scores = columns.pop("score", [0.5] * len(clips))
    rows = []
    for at, ((name, one), (member, content)) in enumerate(zip(encoded.items(), members, strict=True)):
        offset, nbytes = places[member]
        media = {"role": "video" if one.suffix == "mp4" else "image", "shard": shard, "member": member}
        media |= {"offset": offset, "nbytes": nbytes, "mime": one.mime, "sha256": hashlib.sha256(content).hexdigest()}
        frames, height, width, _ = clips[name].shape
        rows.append(
            {"sample_id": sample_id(name), "run_id": run_id, "verdict": "accepted", "split": "train", "prompt": name}
            | {"media": [media], "tensors": [], "num_frames": frames, "height": height, "width": width, "fps": 8.0}
            | {"scores": [{"name": "motion", "value": 9.0}, {"name": "prompt_match", "value": scores[at]}], "cost": []}
            | {column: value[at] for column, value in columns.items()}
        )
    committer = Committer(Table(storage, "samples"), run_id)
    committer.commit([write_part(storage, f"samples/{run_id}-0.parquet", pa.Table.from_pylist(rows, SAMPLES))])


def names(storage: Storage, made: Released) -> set[str]:
    parts = [item["path"] for item in made.files if item["path"].endswith(".parquet")]
    return {name for path in parts for name in pq.read_table(storage.path(path))["prompt"].to_pylist()}


def rules(**said: Any) -> Rules:
    return Rules.model_validate(said)
