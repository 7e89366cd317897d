"""Datasets to export: of drawn tensors, of awkward prompts, and one that the stages made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Storage
from pipelines import export as exports
from pipelines.annotate import withdraw
from pipelines.exporters import causvid, fastvideo, hf, webdataset
from pipelines.release import release
from tests.pipelines.exporters import prompted as prompts
from tests.pipelines.exporters.drawn import Made, stored_as


@pytest.fixture(scope="session")
def shapes_once(dataset: Callable[..., Storage]) -> Storage:
    """Releases v1, of 7 samples, and v2, of the same without one and 4 more."""
    storage = dataset(accepted=7, rejected=4, failures=0)
    storage.write_bytes("dataset.json", json.dumps({"name": "shapes"}).encode())
    release(storage, "v1")
    first = next(iter(stored_as(Made)(storage, "v1")))
    withdraw(storage, [str(first.row["sample_id"])])
    release(storage, "v2", "verdict in ('accepted', 'rejected')")
    return storage


@pytest.fixture
def shapes(shapes_once: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """That dataset; an export only reads it. Two samples a chunk."""
    monkeypatch.setattr(exports, "read_samples", stored_as(Made))
    monkeypatch.setattr(fastvideo, "samples_in", lambda nbytes, sample_nbytes: 2)
    return shapes_once


@pytest.fixture(scope="session")
def prompted_once(dataset: Callable[..., Storage]) -> Storage:
    """Releases v1, of 7 samples, and v2, of the same and 4 more."""
    storage = dataset(accepted=7, rejected=4, failures=0)
    said = {"name": "shapes", "tensors": {"latents": "float16", "text_embeddings": "float32"}}
    storage.write_bytes("dataset.json", json.dumps(said).encode())
    release(storage, "v1")
    release(storage, "v2", "verdict in ('accepted', 'rejected')")
    return storage


@pytest.fixture
def prompted(prompted_once: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """That dataset; an export only reads it. Three samples a chunk."""
    monkeypatch.setattr(exports, "read_samples", prompts.stored_as(prompts.Made))
    for module in (causvid, hf, webdataset):
        monkeypatch.setattr(module, "samples_in", lambda *sizes: 3)
    return prompted_once


@pytest.fixture(scope="session")
def paths(generate_from: Callable[..., Path]) -> Storage:
    """All states of the accepted paths of three steps, and their texts."""
    root = generate_from(
        recipe="trajectory",
        trajectory={"keep": "all", "dtype": "float32"},
        sampler={"num_inference_steps": 3},
        output={"keep_rejected": "latents"},
    )
    storage = Storage(str(root))
    release(storage, "v1")
    release(storage, "all", "verdict in ('accepted', 'rejected')")
    return storage


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """load_dataset with no network and a cache of its own."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return datasets.load_dataset
