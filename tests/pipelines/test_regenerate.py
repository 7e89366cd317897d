from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.schema import FAILURES
from infra.storage import Storage
from infra.tables import Table
from pipelines.regenerate import regenerate


def samples(storage: Storage) -> list[dict[str, Any]]:
    return Table(storage, "samples").read().to_pylist()


def change_row(storage: Storage, sample_id: str, **changes: Any) -> None:
    """Write a row's part over, which nobody but a test does."""
    for name in Table(storage, "samples").files():
        table = pq.read_table(io.BytesIO(storage.read_bytes(name)))
        rows = table.to_pylist()
        if sample_id in {row["sample_id"] for row in rows}:
            rows = [row | changes if row["sample_id"] == sample_id else row for row in rows]
            storage.delete(name)
            write_part(storage, name, pa.Table.from_pylist(rows, table.schema))


def test_regenerate_makes_the_same_bytes_alone_as_in_a_batch(generated):
    """Accepted and rejected samples of full batches, each made again by itself."""
    storage = generated().storage
    rows = {
        verdict: [row for row in samples(storage) if row["verdict"] == verdict] for verdict in ("accepted", "rejected")
    }
    for row in (rows["accepted"][-1], rows["rejected"][-1]):
        made = regenerate(storage, row["sample_id"])
        assert made.latents == "same"
        assert made.media == ("same" if row["verdict"] == "accepted" else "not stored")
        assert made.is_same
        assert made.promise == "to the bit"
        assert made.psnr is None
        assert made.latents_difference is None
        json.dumps(made.as_dict(), allow_nan=False)


def test_regenerate_says_how_far_it_is_from_what_is_stored(generated):
    """A row whose noise is another's: what is stored of it is not what it says."""
    storage = generated().storage
    row, other, *_ = (row for row in samples(storage) if row["verdict"] == "accepted")
    change_row(storage, row["sample_id"], noise_key=other["noise_key"])
    made = regenerate(storage, row["sample_id"])
    assert (made.media, made.latents, made.is_same) == ("different", "different", False)
    assert made.psnr is not None
    assert 5 < made.psnr < 40
    assert made.latents_difference is not None
    assert made.latents_difference > 0.1
    assert "PSNR" in str(made)


def test_regenerate_refuses_what_it_cannot_make_again(generated):
    storage = generated().storage
    row = samples(storage)[0]
    with pytest.raises(UserError, match="has no sample 'nothing'"):
        regenerate(storage, "nothing")
    committer = Committer(Table(storage, "failures"), "run-a")
    failure = {"sample_id": "f" * 32, "attempt": 1, "error_type": "nan_latents", "error": "not finite"}
    committer.commit([write_part(storage, "failures/run-a-0.parquet", pa.Table.from_pylist([failure], FAILURES))])
    with pytest.raises(UserError, match="was never made \\(nan_latents: not finite\\)"):
        regenerate(storage, "f" * 32)
    change_row(storage, row["sample_id"], model_sha256="0" * 64)
    with pytest.raises(
        UserError, match="pack://tiny: the checkpoint has changed: expected content sha256 000000000000"
    ):
        regenerate(storage, row["sample_id"])
    change_row(storage, row["sample_id"], model="pack://gone")
    with pytest.raises(UserError, match="there is no such pack"):
        regenerate(storage, row["sample_id"])


def test_regenerate_says_that_stored_media_cannot_be_read(generated):
    storage = generated().storage
    row, other, *_ = (row for row in samples(storage) if row["verdict"] == "accepted")
    change_row(storage, row["sample_id"], noise_key=other["noise_key"])
    for item in row["media"]:
        storage.write_bytes(item["shard"], np.zeros(10, np.uint8).tobytes())
    with pytest.raises(UserError, match="cannot be read"):
        regenerate(storage, row["sample_id"])
