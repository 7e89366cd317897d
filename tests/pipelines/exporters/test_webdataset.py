"""Exports to WebDataset's tars, read back by its own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from infra.storage import Storage
from pipelines import export as exports
from pipelines.export import export
from tests.pipelines.exporters.prompted import (
    STEPS,
    TIMESTEPS,
    Made,
    samples,
    stored_as,
)


def test_webdataset_reads_each_sample_whole(prompted: Storage, tmp_path: Path) -> None:
    export(prompted, "v1", "webdataset", str(tmp_path))
    tars = sorted(str(path) for path in tmp_path.glob("*.tar"))
    names = ["train-000000", "train-000001", "train-000002", "validation-000000"]
    assert [Path(tar).stem for tar in tars] == names, "numbers of a split have no gaps"
    found = {item["__key__"]: item for item in wds.WebDataset(tars, shardshuffle=False).decode()}
    assert sorted(found) == [sample.row["sample_id"] for sample in samples(prompted)]
    for sample in samples(prompted):
        assert isinstance(sample, Made)
        item, row = found[str(sample.row["sample_id"])], sample.row
        assert Path(item["__url__"]).stem.startswith(row["split"])
        assert item["txt"] == (row["caption"] or row["prompt"])
        assert (item["json"]["prompt"], item["json"]["noise_key"]) == (row["prompt"], row["noise_key"])
        assert item["latent.npy"].dtype == item["trajectory.npy"].dtype == np.float16
        assert np.array_equal(item["latent.npy"], sample.latents())
        assert np.array_equal(item["trajectory.npy"], sample.trajectory().states)
        assert item["trajectory.json"]["timesteps"] == list(TIMESTEPS)
        assert item["trajectory.json"]["places"] == list(range(STEPS + 1))
        text = sample.text()
        assert np.array_equal(item["text.npy"], text["prompt_embeds"]) and item["text.npy"].dtype == np.float32
        assert np.array_equal(item["pooled.npy"], text["pooled"])


def test_webdataset_holds_the_stored_media_and_what_a_dataset_keeps(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = {"tensors": [], "extra_json": "{}", "caption": ""}
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, **bare))
    export(prompted, "v1", "webdataset", str(tmp_path))
    found = {
        item["__key__"]: item for item in wds.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False)
    }
    for sample in samples(prompted):
        item = found[str(sample.row["sample_id"])]
        assert {key for key in item if not key.startswith("__")} == {"json", "txt", "mp4"}
        assert item["mp4"] == sample.media()[0]
        assert item["txt"].decode() == sample.row["prompt"]


def test_a_prompt_without_media_is_a_sample_too(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, tensors=[], media=[]))
    export(prompted, "v1", "webdataset", str(tmp_path / "tars"))
    first = next(iter(wds.WebDataset(str(tmp_path / "tars" / "train-000000.tar"), shardshuffle=False).decode()))
    assert {key for key in first if not key.startswith("__")} == {
        "json", "txt", "text.npy", "pooled.npy", "promptembedsmask.npy",
    }  # fmt: skip
    export(prompted, "v1", "hf", str(tmp_path / "hub"))
    assert {path.name for path in (tmp_path / "hub").iterdir() if path.is_dir()} == {"samples", "embeddings"}
