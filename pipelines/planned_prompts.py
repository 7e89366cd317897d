"""The plan file of a run: its resolved prompts, in the order in which they are enumerated."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.enumeration import PLANNED
from pipelines.resolve import Resolved


def write_plan(run: Resolved, chunks: Iterator[pa.Table]) -> str:
    """Write the resolved prompts, in order, under a name made of their content; the same prompts give the same file."""
    digest = hashlib.blake2b(digest_size=16)
    with tempfile.TemporaryFile() as file:
        with pq.ParquetWriter(file, PLANNED, compression="zstd") as writer:
            for chunk in chunks:
                writer.write_table(chunk)
                for prompt_id in chunk["prompt_id"].to_pylist():
                    digest.update(bytes.fromhex(prompt_id))
        name = f"plans/{digest.hexdigest()}.parquet"
        if not run.storage.exists(name):
            file.seek(0)
            with run.storage.writing(name) as target:
                shutil.copyfileobj(file, target)
    return name
