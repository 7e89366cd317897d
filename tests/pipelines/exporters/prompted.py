"""Samples of paths, with awkward prompts, noise, texts by prompt and the media of their dataset."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from infra.storage import Storage
from pipelines.release import read_release
from pipelines.samples import StoredSample, Trajectory

STEPS, LATENT = 4, (3, 2, 4, 4)
TIMESTEPS = (1000.0, 900.5, 750.25, 500.0, 0.0)
PROMPTS = (
    "",
    "une forme \u202e 形 🟥 \"'`|\\ \x00 end",
    "a red circle",
    "two\nlines, a tab\t and ../../etc/passwd",
    "a blue square",
)
"""None of them may become part of a name."""


def text_id(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


@dataclass(frozen=True)
class Made(StoredSample):
    """A sample whose tensors are drawn from its id, and whose media are those of the dataset."""

    def _draw(self, what: str, *shape: int, of: str = "sample_id") -> np.ndarray:
        seed = int(text_id(str(self.row[of]))[:8], 16)
        return np.random.default_rng([seed, *what.encode()]).standard_normal(shape, np.float32)

    def _states(self) -> np.ndarray:
        drawn = self._draw("states", STEPS + 1, *LATENT)
        return drawn.astype(np.float16).astype(np.float32)  # as if it had been stored so

    def latents(self) -> np.ndarray:
        return self._states()[-1]

    def noise(self) -> np.ndarray:
        return self._states()[0]

    def trajectory(self) -> Trajectory:
        return Trajectory(self._states(), tuple(range(STEPS + 1)), TIMESTEPS, tuple(t / 1000 for t in TIMESTEPS), STEPS)

    def text(self) -> dict[str, np.ndarray]:
        tokens = 3 + len(str(self.row["prompt"])) % 4
        drawn = {"prompt_embeds": self._draw("text", tokens, 6, of="prompt"), "pooled": self._draw("p", 5, of="prompt")}
        return {**drawn, "prompt_embeds_mask": np.ones(tokens, np.int64)}

    def negative_text(self) -> dict[str, np.ndarray]:
        return Made(self.storage, dict(self.row) | {"prompt": self.row["negative_prompt"]}).text()

    def media(self) -> tuple[bytes, str]:
        item = self.row["media"][0]
        start = item["offset"]
        data = self.storage.read_bytes(item["shard"], start, start + item["nbytes"])
        return data, item["member"].rpartition(".")[2]


def tensor(role: str, *shape: int, dtype: str = "float16") -> dict[str, Any]:
    return {"role": role, "dtype": dtype, "shape": list(shape), "nbytes": 2 * int(np.prod(shape))}


LATENTS, STATES = tensor("latents", *LATENT), tensor("trajectory", STEPS + 1, *LATENT)


def rows(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
    found = [
        row
        for item in read_release(storage, name).files
        for row in pq.read_table(io.BytesIO(storage.read_bytes(item["path"]))).to_pylist()
    ]
    for row in sorted(found, key=lambda row: row["sample_id"]):
        at = int(row["sample_id"][:8], 16) % len(PROMPTS)
        prompt, negative = PROMPTS[at], "blurred"
        ids = {"text_id": text_id(prompt), "negative_text_id": text_id(negative)}
        yield row | {
            "prompt": prompt,
            "negative_prompt": negative,
            "split": "validation" if at == 3 else "train",
            "num_inference_steps": STEPS,
            "tensors": [LATENTS, STATES],
            "extra_json": json.dumps(ids),
        }


def stored_as(kind: type[StoredSample], **columns: Any) -> Callable[..., Iterator[StoredSample]]:
    """A read_samples whose samples are of `kind`, with these columns."""

    def read_samples(storage: Storage, name: str, *, since: tuple[str, ...] = ()) -> Iterator[StoredSample]:
        known = {row["sample_id"] for earlier in since for row in rows(storage, earlier)}
        for row in rows(storage, name):
            if row["sample_id"] not in known:
                yield kind(storage, row | columns)

    return read_samples


def samples(storage: Storage, name: str = "v1") -> list[StoredSample]:
    return list(stored_as(Made)(storage, name))
