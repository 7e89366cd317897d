"""An LMDB as CausVid's and Self-Forcing's loaders read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lmdb
import numpy as np


def items(folder: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


class LmdbReader:
    """As `ODERegressionLMDBDataset` reads: the shape of all, then a row as float16 of that shape."""

    def __init__(self, folder: Path) -> None:
        self._items = items(folder)
        self.shape = tuple(map(int, self._items[b"latents_shape"].decode().split()))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: int) -> tuple[str, np.ndarray]:
        latents = np.frombuffer(self._items[f"latents_{at}_data".encode()], np.float16).reshape(self.shape[1:])
        latents = latents[None] if latents.ndim == 4 else latents
        return self._items[f"prompts_{at}_data".encode()].decode(), latents.astype(np.float32)

    def said(self, key: str) -> Any:
        return json.loads(self._items[key.encode()])
