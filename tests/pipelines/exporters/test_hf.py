"""Exports to a folder of the Hugging Face hub, read back by load_dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import yaml

from infra.storage import Storage
from pipelines import export as exports
from pipelines.export import export
from pipelines.exporters import hf, webdataset
from pipelines.release import release
from pipelines.samples import StoredSample
from tests.pipelines.exporters.prompted import (
    LATENT,
    LATENTS,
    STEPS,
    TIMESTEPS,
    Made,
    rows,
    samples,
    stored_as,
    text_id,
)


def test_hub_folder_loads_each_config(prompted: Storage, tmp_path: Path, load: Callable[..., Any]) -> None:
    import datasets

    export(prompted, "v1", "hf", str(tmp_path))
    header = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    configs = [config["config_name"] for config in header["configs"]]
    assert configs == ["samples", "videos", "latents", "trajectories", "embeddings"]
    assert header["size_categories"] == ["n<1K"] and header["task_categories"] == ["text-to-video"]
    loaded = {config: load(str(tmp_path), config) for config in configs}
    made = {str(sample.row["sample_id"]): sample for sample in samples(prompted)}
    for config, splits in loaded.items():
        assert set(splits) == {"train", "validation"}
        if config != "embeddings":
            ids = {split: splits[split]["sample_id"] for split in splits}
            assert (len(ids["train"]), len(ids["validation"])) == (6, 1)
            assert {*ids["train"], *ids["validation"]} == set(made)
    assert load(str(tmp_path))["train"].column_names == loaded["samples"]["train"].column_names, (
        "what is loaded unasked"
    )
    rows = [row for split in loaded["samples"].values() for row in split]
    assert {row["sample_id"]: row["prompt"] for row in rows} == {name: one.row["prompt"] for name, one in made.items()}

    videos = loaded["videos"]["train"]
    assert isinstance(videos.features["video"], datasets.Video)
    for row in videos.cast_column("video", datasets.Video(decode=False)):
        assert row["video"] == {"bytes": made[row["sample_id"]].media()[0], "path": f"{row['sample_id']}.mp4"}

    latents = loaded["latents"]["train"]
    assert latents.features["latents"] == datasets.Array4D(LATENT, "float16")
    for row in latents.with_format("numpy"):
        assert np.array_equal(row["latents"], made[row["sample_id"]].latents())

    states = loaded["trajectories"]["train"]
    assert states.features["states"] == datasets.Array5D((STEPS + 1, *LATENT), "float16")
    for row in states.with_format("numpy"):
        assert np.array_equal(row["states"], made[row["sample_id"]].trajectory().states)
        assert row["places"].tolist() == list(range(STEPS + 1)) and row["steps"] == STEPS
    assert states[0]["timesteps"] == list(TIMESTEPS)


def test_hub_folder_holds_each_text_once(prompted: Storage, tmp_path: Path, load: Callable[..., Any]) -> None:
    import datasets

    export(prompted, "v1", "hf", str(tmp_path))
    export(prompted, "v2", "hf", str(tmp_path), since="v1")
    train = load(str(tmp_path), "embeddings")["train"]
    assert train.features["prompt_embeds"] == datasets.Array2D((None, 6), "float32")
    expected = {sample.row["prompt"] for sample in stored_as(Made)(prompted, "v2") if sample.row["split"] == "train"}
    assert sorted(train["text"]) == sorted({*expected, "blurred"})
    by_text = {sample.row["prompt"]: sample for sample in samples(prompted, "v2")}
    for row in train.with_format("numpy"):
        assert row["text_id"] == text_id(row["text"])
        if row["text"] != "blurred":
            text = by_text[str(row["text"])].text()  # type: ignore[attr-defined]
            assert np.array_equal(row["prompt_embeds"], text["prompt_embeds"])
            assert np.array_equal(row["pooled"], text["pooled"])


def test_texts_are_of_the_type_that_the_dataset_keeps(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    for module in (hf, webdataset):
        monkeypatch.setattr(module, "text_dtype", lambda storage: "float16")
    export(prompted, "v1", "hf", str(tmp_path / "hub"))
    export(prompted, "v1", "webdataset", str(tmp_path / "tars"))
    text = next(one for one in samples(prompted) if one.row["split"] == "train").text()
    row = next(iter(load(str(tmp_path / "hub"), "embeddings", split="train").with_format("arrow").iter(1)))
    item = next(iter(wds.WebDataset(str(tmp_path / "tars" / "train-000000.tar"), shardshuffle=False).decode()))
    assert row.schema.field("pooled").type.value_type == "halffloat" and item["pooled.npy"].dtype == np.float16
    half = text["pooled"].astype(np.float16)
    assert np.array_equal(row["pooled"][0].values.to_numpy(), half) and np.array_equal(item["pooled.npy"], half)
    assert item["promptembedsmask.npy"].dtype == np.int64


def test_hub_folder_keeps_shapes_apart(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    @dataclass(frozen=True)
    class Wide(Made):
        def latents(self) -> np.ndarray:
            return self._draw("latents", 3, 2, 4, 6)

    def mixed(storage: Storage, name: str, *, since: str | None = None) -> Iterator[StoredSample]:
        for at, row in enumerate(rows(storage, name)):
            yield (Wide if at % 2 else Made)(storage, row | {"tensors": [LATENTS]})

    monkeypatch.setattr(exports, "read_samples", mixed)
    export(prompted, "v1", "hf", str(tmp_path))
    shape = {
        name: load(str(tmp_path), name, split="train").features["latents"].shape for name in ("latents", "latents-2")
    }
    assert shape == {"latents": (3, 2, 4, 4), "latents-2": (3, 2, 4, 6)}


def test_hub_folder_of_images(
    prompted_once: Storage, tmp_path: Path, dataset: Callable[..., Storage], load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    storage = dataset(accepted=3, rejected=0, failures=0, num_frames=1)
    storage.write_bytes("dataset.json", json.dumps({"name": "pictures"}).encode())
    release(storage, "v1")
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, tensors=[], extra_json="{}"))
    export(storage, "v1", "hf", str(tmp_path))
    images = load(str(tmp_path), "images", split="train")
    assert images[0]["image"].size == (64, 64)


def test_rows_go_out_in_groups(prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "GROUP_NBYTES", 1)
    export(prompted, "v1", "hf", str(tmp_path))
    assert pq.ParquetFile(tmp_path / "latents" / "train-000000.parquet").num_row_groups == 3
