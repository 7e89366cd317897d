"""Exports of every format but FastVideo's: cut short anywhere, added to, and of a dataset that the stages made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from infra.storage import Storage
from pipelines.export import export
from pipelines.release import release
from pipelines.samples import read_samples
from tests.pipelines.exporters.lmdb_reader import LmdbReader, items
from tests.pipelines.exporters.prompted import (
    Made,
    stored_as,
)

TO = ("causvid-lmdb", "self-forcing-lmdb", "webdataset", "hf")


def content(folder: Path) -> dict[str, Any]:
    """What readers see of each file: of an LMDB its items, because its bytes tell of transactions, too."""
    return {
        str(path.relative_to(folder)): items(path.parent) if path.name == "data.mdb" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def photographing(monkeypatch: pytest.MonkeyPatch, out: Path, to: Path) -> None:
    """Copy the folder before and after each rename, and at each read of a tensor: what a kill there would leave."""
    count = 0

    def photographed(do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            for act in (lambda: None, lambda: do(*args)):
                done = act()
                shutil.copytree(out, to / f"{count:03d}")
                count += 1
            return done

        return call

    monkeypatch.setattr(Path, "replace", photographed(Path.replace))
    monkeypatch.setattr(Made, "trajectory", photographed(Made.trajectory))


@pytest.mark.parametrize("to", TO)
def test_an_export_cut_short_anywhere_ends_like_one_that_never_was(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    out, photographs = tmp_path / "whole", tmp_path / "photographs"
    with monkeypatch.context() as patch:
        photographing(patch, out, photographs)
        export(prompted, "v1", to, str(out))
    whole = content(out)
    assert not [name for name in whole if name.endswith(".tmp")]
    taken = sorted(photographs.iterdir())
    assert len(taken) >= 2 * (7 + 4), "each sample's states, and what is done after the look at the rows and each chunk"
    for photograph in taken:
        export(prompted, "v1", to, str(photograph))
        assert content(photograph) == whole, photograph.name


@pytest.mark.parametrize("to", TO)
def test_a_later_release_is_added_and_leaves_what_is_there(prompted: Storage, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    export(prompted, "v1", to, str(out))
    before = content(out)
    done = export(prompted, "v2", to, str(out), since="v1")
    assert (done.samples, done.in_folder) == (4, 11)
    after = content(out)
    for name, held in before.items():
        if isinstance(held, dict):
            assert {key: value for key, value in held.items() if not key.endswith(b"_shape")}.items() <= after[
                name
            ].items()
        elif name not in ("export.json", "README.md"):
            assert after[name] == held
    added = [sample.row["sample_id"] for sample in stored_as(Made)(prompted, "v2", since=("v1",))]
    if to.endswith("lmdb"):
        keys = {path.parent: items(path.parent) for path in (out / "lmdb").rglob("data.mdb")}
        assert sum(int(held[b"prompts_shape"]) for held in keys.values()) == 11
        ids = {value.decode() for held in keys.values() for key, value in held.items() if key.startswith(b"ids_")}
        assert set(added) <= ids
    export(prompted, "v2", to, str(out), since="v1")
    assert content(out) == after


# ---- of a dataset that the stages made


@pytest.fixture(scope="module")
def some_states(generate_from: Callable[..., Path]) -> Storage:
    """What the first, the second and the last of three steps made, and the texts."""
    root = generate_from(
        recipe="trajectory",
        trajectory={"keep": [0, 1, -1], "convention": "after", "dtype": "float32"},
        sampler={"num_inference_steps": 3},
        output={"keep_rejected": "none"},
    )
    storage = Storage(str(root))
    release(storage, "v1")
    return storage


def test_a_generated_dataset_is_exported_bit_for_bit(
    some_states: Storage, tmp_path: Path, load: Callable[..., Any]
) -> None:
    made = list(read_samples(some_states, "v1"))
    assert 0 < len(made) < 6
    for to in TO:
        assert export(some_states, "v1", to, str(tmp_path / to)).samples == len(made)
    states = LmdbReader(tmp_path / "causvid-lmdb" / "lmdb")
    tars = wds.WebDataset(sorted(map(str, (tmp_path / "webdataset").glob("*.tar"))), shardshuffle=False)
    tar = {item["__key__"]: item for item in tars.decode()}
    hub = {row["sample_id"]: row for row in of_splits(load(str(tmp_path / "hf"), "trajectories"))}
    texts = {row["text_id"]: row for row in of_splits(load(str(tmp_path / "hf"), "embeddings"))}
    assert len(made) == len(states) == len(tar) == len(hub)
    for at, sample in enumerate(made):
        name, path = str(sample.row["sample_id"]), sample.trajectory()
        assert path.places == (1, 2, 3)
        whole = np.concatenate([sample.noise()[None], path.states]).astype(np.float16)
        assert np.array_equal(states[at][1], whole.swapaxes(1, 2))
        assert np.array_equal(LmdbReader(tmp_path / f"self-forcing-lmdb/lmdb/shard_{at}")[0][1], whole.swapaxes(1, 2))
        assert np.array_equal(tar[name]["trajectory.npy"], path.states)
        assert np.array_equal(hub[name]["states"], path.states)
        assert hub[name]["timesteps"].tolist() == np.float32(path.timesteps).tolist()
        assert hub[name]["places"].tolist() == list(path.places)
        embeds = sample.text()["prompt_embeds"]
        assert np.array_equal(tar[name]["text.npy"], embeds)
        assert np.array_equal(texts[json.loads(sample.row["extra_json"])["text_id"]]["prompt_embeds"], embeds)


def of_splits(loaded: Any) -> list[Any]:
    return [row for split in loaded.values() for row in split.with_format("numpy")]
