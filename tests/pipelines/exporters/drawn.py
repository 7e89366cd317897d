"""Samples of paths whose tensors are drawn from their ids."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from infra.storage import Storage
from pipelines.release import read_release
from pipelines.samples import StoredSample, Trajectory

STEPS, LATENT = 5, (3, 2, 4, 4)
TIMESTEPS = (999.0, 900.5, 750.25, 500.0, 214.875)
SCALING = {"std": [2.0, 0.5, 3.0], "mean": [0.25, -1.0, 0.125], "scaling_factor": 0.5, "shift_factor": 0.0625}


@dataclass(frozen=True)
class Made(StoredSample):
    """A sample whose tensors are drawn from its id."""

    def _draw(self, what: str, *shape: int) -> np.ndarray:
        seed = int(str(self.row["sample_id"])[:8], 16)
        return np.random.default_rng([seed, *what.encode()]).standard_normal(shape, np.float32)

    def latents(self) -> np.ndarray:
        return self.trajectory().states[-1]

    def trajectory(self) -> Trajectory:
        return Trajectory(
            states=self._draw("states", STEPS + 1, *LATENT),
            places=tuple(range(STEPS + 1)),
            timesteps=(*TIMESTEPS, 0.0),
            sigmas=(*(t / 1000 for t in TIMESTEPS), 0.0),
            steps=STEPS,
        )

    def text(self) -> dict[str, np.ndarray]:
        return {"prompt_embeds": self._draw("text", 3 + int(str(self.row["sample_id"])[:8], 16) % 4, 6)}


Samples = Callable[..., Iterator[StoredSample]]


def stored_as(kind: type[StoredSample], **columns: Any) -> Samples:
    """A read_samples whose samples are of `kind`, with these columns."""

    def ids(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
        for item in read_release(storage, name).files:
            yield from pq.read_table(io.BytesIO(storage.read_bytes(item["path"]))).to_pylist()

    def read_samples(storage: Storage, name: str, *, since: tuple[str, ...] = ()) -> Iterator[StoredSample]:
        known = {row["sample_id"] for earlier in since for row in ids(storage, earlier)}
        facts = {
            "num_inference_steps": STEPS,
            "plan_json": json.dumps({"latents": SCALING, "timesteps": TIMESTEPS}),
            "tensors": [{"role": "trajectory"}],
        }
        for row in ids(storage, name):
            if row["sample_id"] not in known:
                yield kind(storage, row | facts | columns)

    return read_samples


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
