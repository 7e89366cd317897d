"""Exports to CausVid's and Self-Forcing's LMDB."""

from __future__ import annotations

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
from pipelines.exporters import causvid
from pipelines.samples import StoredSample, Trajectory
from tests.pipelines.exporters.lmdb_reader import LmdbReader, items
from tests.pipelines.exporters.prompted import (
    LATENT,
    LATENTS,
    STEPS,
    TIMESTEPS,
    Made,
    samples,
    stored_as,
    tensor,
)


@dataclass(frozen=True)
class AfterSteps(Made):
    """Chosen states without the noise and without the final latent."""

    def trajectory(self) -> Trajectory:
        whole = super().trajectory()
        return Trajectory(whole.states[1:4], (1, 2, 3), TIMESTEPS[1:4], whole.sigmas[1:4], STEPS)


def test_causvid_reads_states_from_noise_to_final_latent_frames_first(prompted: Storage, tmp_path: Path) -> None:
    export(prompted, "v1", "causvid-lmdb", str(tmp_path))
    found = LmdbReader(tmp_path / "lmdb")
    assert found.shape == (7, STEPS + 1, 2, 3, 4, 4)
    for at, sample in enumerate(samples(prompted)):
        prompt, states = found[at]
        assert prompt == sample.row["prompt"]
        assert np.array_equal(states, sample.trajectory().states.swapaxes(1, 2))
        assert np.array_equal(states[0].swapaxes(0, 1), sample.noise())
        assert np.array_equal(states[-1].swapaxes(0, 1), sample.latents())
    told = {"places": [0, 1, 2, 3, 4], "num_inference_steps": 4, "timesteps": list(TIMESTEPS)}
    assert told.items() <= found.said("states").items()
    assert sum(found[at][0] == "a red circle" for at in range(7)) == 2, "one prompt, two samples, two rows"


def test_causvid_is_given_the_noise_and_the_final_latent_where_they_were_not_kept(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(prompted, "v1", "causvid-lmdb", str(tmp_path / "all"))
    monkeypatch.setattr(exports, "read_samples", stored_as(AfterSteps))
    export(prompted, "v1", "causvid-lmdb", str(tmp_path / "chosen"))
    whole, chosen = LmdbReader(tmp_path / "all" / "lmdb"), LmdbReader(tmp_path / "chosen" / "lmdb")
    assert all(np.array_equal(whole[at][1], chosen[at][1]) for at in range(7))
    assert chosen.said("states")["timesteps"] == [None, 900.5, 750.25, 500.0, 0.0]


def test_clean_latents_are_rows_of_one_state(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, tensors=[LATENTS]))
    export(prompted, "v1", "causvid-lmdb", str(tmp_path))
    found = LmdbReader(tmp_path / "lmdb")
    assert found.shape == (7, 2, 3, 4, 4)
    for at, sample in enumerate(samples(prompted)):
        assert found[at][1].shape == (1, 2, 3, 4, 4)
        assert np.array_equal(found[at][1][0].swapaxes(0, 1), sample.latents())


@dataclass(frozen=True)
class Image(Made):
    def trajectory(self) -> Trajectory:
        whole = super().trajectory()
        return Trajectory(whole.states[:, :, 0], whole.places, whole.timesteps, whole.sigmas, whole.steps)


def test_an_image_is_a_video_of_one_frame(prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = tensor("trajectory", STEPS + 1, 3, 4, 4)
    monkeypatch.setattr(exports, "read_samples", stored_as(Image, tensors=[states]))
    export(prompted, "v1", "causvid-lmdb", str(tmp_path))
    found = LmdbReader(tmp_path / "lmdb")
    assert found.shape == (7, STEPS + 1, 1, 3, 4, 4)
    assert np.array_equal(found[0][1][:, 0], samples(prompted)[0].trajectory().states[:, :, 0])


def test_self_forcing_reads_shards_that_may_be_empty(prompted: Storage, tmp_path: Path) -> None:
    export(prompted, "v1", "self-forcing-lmdb", str(tmp_path / "out"))
    export(prompted, "v2", "self-forcing-lmdb", str(tmp_path / "out"), since="v1")
    folder = tmp_path / "out" / "lmdb"
    assert {path.name for path in folder.iterdir()} == {f"shard_{k}" for k in range(16)}, (
        "the reader opens all it finds"
    )
    order = samples(prompted) + list(stored_as(Made)(prompted, "v2", since=("v1",)))
    for shard in range(16):
        found = LmdbReader(folder / f"shard_{shard}")
        assert found.shape == (int(shard < len(order)), STEPS + 1, 2, 3, 4, 4)
        for at in range(len(found)):
            assert np.array_equal(found[at][1], order[16 * at + shard].trajectory().states.swapaxes(1, 2))


def test_a_map_that_is_full_is_doubled(prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causvid, "MAP_NBYTES", 16 << 10)
    export(prompted, "v1", "causvid-lmdb", str(tmp_path / "small"))
    monkeypatch.undo()
    monkeypatch.setattr(exports, "read_samples", stored_as(Made))
    export(prompted, "v1", "causvid-lmdb", str(tmp_path / "large"))
    assert items(tmp_path / "small" / "lmdb") == items(tmp_path / "large" / "lmdb")
    assert (tmp_path / "large" / "lmdb" / "data.mdb").stat().st_size < 1 << 20, "the file is as large as its rows"


@dataclass(frozen=True)
class TooLarge(Made):
    def latents(self) -> np.ndarray:
        return super().latents() * np.float32(1e6)


@pytest.mark.parametrize(
    ("kind", "columns", "said"),
    [
        (Made, {"tensors": []}, "keeps neither a trajectory nor latents"),
        (TooLarge, {"tensors": [LATENTS]}, "float16 ends at 65504"),
    ],
)
def test_what_lmdb_cannot_hold_is_refused(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Made], columns: Any, said: str
) -> None:
    monkeypatch.setattr(exports, "read_samples", stored_as(kind, **columns))
    with pytest.raises(UserError, match=said):
        export(prompted, "v1", "causvid-lmdb", str(tmp_path))


def test_several_shapes_are_refused_before_the_first_row(
    prompted: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed(storage: Storage, name: str, *, since: str | None = None) -> Iterator[StoredSample]:
        for at, sample in enumerate(stored_as(Made)(storage, name)):
            other = {"tensors": [tensor("trajectory", STEPS + 1, 3, 4, 4, 4)]}
            yield sample if at < 5 else Made(storage, dict(sample.row) | other)

    monkeypatch.setattr(exports, "read_samples", mixed)
    with pytest.raises(UserError, match=r"of one kind.*--where \"verdict = 'accepted' and height = 64 and width = 64"):
        export(prompted, "v1", "causvid-lmdb", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_causvid_and_fastvideo_hold_the_same_states(prompted: Storage, tmp_path: Path) -> None:
    """CausVid's state k is what step k starts from, FastVideo's what it has made: one further on."""
    for to in ("causvid-lmdb", "fastvideo-ode"):
        export(prompted, "v1", to, str(tmp_path / to))
    found = LmdbReader(tmp_path / "causvid-lmdb" / "lmdb")
    other = [
        row
        for path in sorted((tmp_path / "fastvideo-ode").rglob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert len(found) == len(other) == 7
    for at, row in enumerate(other):
        states = np.frombuffer(row["trajectory_latents_bytes"], np.float32).reshape(row["trajectory_latents_shape"])[0]
        timesteps = np.frombuffer(row["trajectory_timesteps_bytes"], np.float32)
        assert states.shape == (STEPS, *LATENT)
        assert np.array_equal(found[at][1][1:].swapaxes(1, 2), states)
        assert np.array_equal(found.said("states")["timesteps"][:-1], timesteps), (
            "of the state that the step starts from"
        )
