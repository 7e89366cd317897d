"""Exports to FastVideo's Parquet, read back as its loaders read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.errors import UserError
from infra.storage import Storage
from pipelines import export as exports
from pipelines.export import export
from pipelines.exporters import fastvideo
from pipelines.samples import StoredSample, Trajectory, read_samples
from tests.pipelines.exporters.drawn import LATENT, SCALING, STEPS, TIMESTEPS, Made, files, stored_as


def tensors(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """As FastVideo's loader reads a row: each *_bytes as float32 of *_shape, whatever *_dtype says."""
    return {
        name.removesuffix("_bytes"): np.frombuffer(data, np.float32).reshape(row[name.replace("_bytes", "_shape")])
        for name, data in row.items()
        if name.endswith("_bytes")
    }


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    found = [row for path in folder.rglob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["id"]: row for row in found}


def exported(shapes: Storage, to: str, out: Path) -> list[tuple[Made, dict[str, Any], dict[str, np.ndarray]]]:
    export(shapes, "v1", to, str(out))
    found = rows(out / "combined_parquet_dataset")
    samples = list(stored_as(Made)(shapes, "v1"))
    assert len(samples) == len(found) == 7
    matched = [(sample, found[str(sample.row["sample_id"])]) for sample in samples]
    return [(sample, row, tensors(row)) for sample, row in matched]  # type: ignore[misc]


def test_t2v_holds_what_the_autoencoder_would_have_made(shapes: Storage, tmp_path: Path) -> None:
    std, mean = (np.array(SCALING[name], np.float32)[:, None, None, None] for name in ("std", "mean"))
    for sample, row, held in exported(shapes, "fastvideo-t2v", tmp_path / "out"):
        assert set(held) == {"vae_latent", "text_embedding"}
        assert np.array_equal(held["vae_latent"], sample.latents() * std / np.float32(0.5) + mean + np.float32(0.0625))
        # What FastVideo's normalize_dit_input makes of it is what the denoiser made.
        normalised = (held["vae_latent"] - mean - 0.0625) * (0.5 / std)
        np.testing.assert_allclose(normalised, sample.latents(), rtol=1e-5, atol=1e-6)
        assert np.array_equal(held["text_embedding"], sample.text()["prompt_embeds"])
        said = {"caption": sample.row["prompt"], "media_type": "video", "width": 64, "height": 64, "fps": 8.0}
        assert {name: row[name] for name in said} == said
        assert (row["num_frames"], row["duration_sec"]) == (2, 17 / 8), "frames of the latent, seconds of the video"
        assert (row["vae_latent_dtype"], row["text_embedding_dtype"]) == ("float32", "float32")
        assert (row["noise_key"], row["prompt_id"]) == (sample.row["noise_key"], sample.row["prompt_id"])


def test_ode_holds_what_each_step_made_and_the_timestep_it_was_given(shapes: Storage, tmp_path: Path) -> None:
    for sample, row, held in exported(shapes, "fastvideo-ode", tmp_path / "out"):
        assert held["trajectory_latents"].shape == (1, STEPS, *LATENT)
        assert np.array_equal(held["trajectory_latents"][0], sample.trajectory().states[1:])
        assert np.array_equal(held["trajectory_latents"][0, -1], sample.latents())
        assert np.array_equal(held["trajectory_timesteps"], np.array(TIMESTEPS, np.float32))
        assert np.array_equal(held["text_embedding"], sample.text()["prompt_embeds"])
        assert (row["caption"], row["media_type"]) == (sample.row["prompt"], "text")


def test_text_holds_embeddings_of_their_own_length(shapes: Storage, tmp_path: Path) -> None:
    found = exported(shapes, "fastvideo-text", tmp_path / "out")
    for sample, row, held in found:
        assert set(held) == {"text_embedding"}
        assert np.array_equal(held["text_embedding"], sample.text()["prompt_embeds"])
        assert row["caption"] == sample.row["prompt"]
    assert len({len(held["text_embedding"]) for _, _, held in found}) > 1


def test_a_row_can_be_read_without_its_neighbours(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastvideo, "GROUP_NBYTES", 1)
    export(shapes, "v1", "fastvideo-ode", str(tmp_path / "out"))
    file = pq.ParquetFile(tmp_path / "out" / "combined_parquet_dataset" / "worker_0" / "data_chunk_0.parquet")
    assert file.num_row_groups == 2
    assert file.metadata.row_group(0).column(1).compression == "ZSTD"


@dataclass(frozen=True)
class Partly(Made):
    """Some states only."""

    def trajectory(self) -> Trajectory:
        whole = super().trajectory()
        return Trajectory(whole.states[[0, 2, 5]], (0, 2, 5), (999.0, 750.25, 0.0), (0.999, 0.75, 0.0), STEPS)


@dataclass(frozen=True)
class AfterSteps(Made):
    """Without the noise."""

    def trajectory(self) -> Trajectory:
        whole = super().trajectory()
        return Trajectory(whole.states[1:], whole.places[1:], whole.timesteps[1:], whole.sigmas[1:], STEPS)


@dataclass(frozen=True)
class Textless(Made):
    def text(self) -> dict[str, np.ndarray]:
        raise UserError("output.tensors: the dataset keeps no text embeddings; ...")


def test_states_that_were_named_after_their_step_give_the_same_export(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(shapes, "v1", "fastvideo-ode", str(tmp_path / "all"))
    monkeypatch.setattr(exports, "read_samples", stored_as(AfterSteps))
    export(shapes, "v1", "fastvideo-ode", str(tmp_path / "after"))
    assert files(tmp_path / "after") == files(tmp_path / "all")


@pytest.mark.parametrize(
    ("to", "kind", "columns", "said"),
    [
        (
            "fastvideo-ode",
            Partly,
            {},
            r"needs the state after each of 5 steps.*3 of them \(1, 3, 4\).*trajectory.keep: all",
        ),
        ("fastvideo-t2v", Textless, {}, "the dataset keeps no text embeddings"),
        ("fastvideo-t2v", Made, {"plan_json": "{}"}, "does not record how its latents are scaled"),
    ],
)
def test_a_dataset_without_what_a_format_needs_is_refused_before_anything_is_written(
    shapes: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    kind: type[StoredSample],
    columns: dict[str, str],
    said: str,
) -> None:
    monkeypatch.setattr(exports, "read_samples", stored_as(kind, **columns))
    with pytest.raises(UserError, match=said):
        export(shapes, "v1", to, str(tmp_path / "out"))
    assert files(tmp_path / "out") == {}


def test_samples_of_several_shapes_are_refused_with_the_condition_that_separates_them(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed(storage: Storage, name: str, *, since: tuple[str, ...] = ()) -> Iterator[StoredSample]:
        for at, sample in enumerate(stored_as(Made)(storage, name, since=since)):
            yield sample if at < 5 else Made(storage, dict(sample.row) | {"height": 32})

    monkeypatch.setattr(exports, "read_samples", mixed)
    said = r"shape 64x64x17 and 32x64x17.*--where \"verdict = 'accepted' and height = 64 and width = 64 and num_frames = 17\""
    with pytest.raises(UserError, match=said):
        export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    assert files(tmp_path / "out") == {}
    assert export(shapes, "v1", "fastvideo-text", str(tmp_path / "text")).samples == 7


@pytest.mark.parametrize("to", ["fastvideo-ode", "causvid-lmdb"])
def test_paths_of_several_schedules_are_refused_before_anything_is_written(
    paths: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def mixed(storage: Storage, name: str, *, since: tuple[str, ...] = ()) -> Iterator[StoredSample]:
        for at, sample in enumerate(read_samples(storage, name)):
            said = json.loads(sample.row["extra_json"])
            said["trajectory"]["timesteps"][1] -= at // 2
            yield StoredSample(storage, dict(sample.row) | {"extra_json": json.dumps(said)})

    monkeypatch.setattr(exports, "read_samples", mixed)
    with pytest.raises(UserError, match=r"v1 has samples of states at timesteps \[.*plan_id = '\w{32}'"):
        export(paths, "v1", to, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_addition_is_held_to_the_shape_of_what_is_there(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    before = files(tmp_path / "out")
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, width=96))
    with pytest.raises(UserError, match="shape 64x64x17 and 64x96x17"):
        export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "out"), since="v1")
    assert files(tmp_path / "out") == before


# ---- of a dataset that the stages made


def test_a_generated_dataset_is_exported_bit_for_bit(paths: Storage, tmp_path: Path) -> None:
    samples = {str(sample.row["sample_id"]): sample for sample in read_samples(paths, "v1")}
    assert 0 < len(samples) < 6
    for to in ("fastvideo-ode", "fastvideo-t2v", "fastvideo-text"):
        assert export(paths, "v1", to, str(tmp_path / to)).samples == len(samples)
        found = rows(tmp_path / to / "combined_parquet_dataset")
        assert found.keys() == samples.keys()
        for sample_id, sample in samples.items():
            row, held = found[sample_id], tensors(found[sample_id])
            assert np.array_equal(held["text_embedding"], sample.text()["prompt_embeds"])
            plan = json.loads(sample.row["plan_json"])
            if to == "fastvideo-ode":
                assert np.array_equal(held["trajectory_latents"][0], sample.trajectory().states[1:])
                assert np.array_equal(held["trajectory_latents"][0, -1], sample.latents())
                assert held["trajectory_timesteps"].tolist() == np.array(plan["timesteps"], np.float32).tolist()
            if to == "fastvideo-t2v":
                std, mean = (
                    np.array(plan["latents"][name], np.float32).reshape(-1, 1, 1, 1) for name in ("std", "mean")
                )
                np.testing.assert_allclose((held["vae_latent"] - mean) / std, sample.latents(), rtol=1e-5, atol=1e-5)
                assert row["num_frames"] == sample.latents().shape[1] < sample.row["num_frames"]


def test_samples_that_kept_less_are_refused_before_anything_is_written(paths: Storage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all has samples without trajectory, such as \w{32} \(rejected\)"):
        export(paths, "all", "fastvideo-ode", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert export(paths, "all", "fastvideo-text", str(tmp_path / "out")).samples == 6
