"""Exports: killed anywhere, gone on with, added to; and read back as FastVideo's loaders read them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli import app
from infra.errors import UserError
from infra.storage import Storage
from pipelines import export as exports
from pipelines.annotate import withdraw
from pipelines.export import export
from pipelines.exporters import FORMATS, Format, exporter_of, fastvideo, samples_in
from pipelines.release import read_release, release
from pipelines.samples import StoredSample, Trajectory, read_samples

STEPS, LATENT = 5, (3, 2, 4, 4)
TIMESTEPS = (999.0, 900.5, 750.25, 500.0, 214.875)
SCALING = {"std": [2.0, 0.5, 3.0], "mean": [0.25, -1.0, 0.125], "scaling_factor": 0.5, "shift_factor": 0.0625}


class Killed(Exception):
    """In the place of SIGKILL: nobody catches it."""


@dataclass(frozen=True)
class Made(StoredSample):
    """A sample whose tensors are drawn from its id."""

    def _draw(self, what: str, *shape: int) -> np.ndarray:
        seed = int(str(self.row["sample_id"])[:8], 16)
        return np.random.default_rng([seed, *what.encode()]).standard_normal(shape, np.float32)

    def latents(self) -> np.ndarray:
        return self.trajectory().states[-1]

    def trajectory(self) -> Trajectory:
        return Trajectory(
            states=self._draw("states", STEPS + 1, *LATENT),
            places=tuple(range(STEPS + 1)),
            timesteps=(*TIMESTEPS, 0.0),
            sigmas=(*(t / 1000 for t in TIMESTEPS), 0.0),
            steps=STEPS,
        )

    def text(self) -> dict[str, np.ndarray]:
        return {"prompt_embeds": self._draw("text", 3 + int(str(self.row["sample_id"])[:8], 16) % 4, 6)}


Samples = Callable[..., Iterator[StoredSample]]


def stored_as(kind: type[StoredSample], **columns: Any) -> Samples:
    """A read_samples whose samples are of `kind`, with these columns."""

    def ids(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
        for item in read_release(storage, name).files:
            yield from pq.read_table(io.BytesIO(storage.read_bytes(item["path"]))).to_pylist()

    def read_samples(storage: Storage, name: str, *, since: tuple[str, ...] = ()) -> Iterator[StoredSample]:
        known = {row["sample_id"] for earlier in since for row in ids(storage, earlier)}
        facts = {
            "num_inference_steps": STEPS,
            "plan_json": json.dumps({"latents": SCALING, "timesteps": TIMESTEPS}),
            "tensors": [{"role": "trajectory"}],
        }
        for row in ids(storage, name):
            if row["sample_id"] not in known:
                yield kind(storage, row | facts | columns)

    return read_samples


@pytest.fixture(scope="module")
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


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(folder: Path) -> list[str]:
    names = sorted(folder.rglob("*.parquet"), key=lambda path: int(path.stem.rsplit("_", 1)[-1]))
    return [row for name in names for row in pq.read_table(name, columns=["id"])["id"].to_pylist()]


def of_release(storage: Storage, name: str, since: tuple[str, ...] = ()) -> list[str]:
    return [str(sample.row["sample_id"]) for sample in stored_as(Made)(storage, name, since=since)]


# ---- killed and gone on with


def killing(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    """Raise at the `at`-th rename or read of a tensor, before it or after it."""
    count = -1

    def counted(do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                raise Killed
            done = do(*args)
            if count == at:
                raise Killed
            return done

        return call

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Made, "latents", counted(Made.latents))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_export_killed_anywhere_ends_with_the_bytes_of_one_that_never_was(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".parquet")]) == 4
    killed = 0
    while True:
        out = tmp_path / f"killed-{killed}"
        with monkeypatch.context() as patch:
            killing(patch, killed, after)
            try:
                export(shapes, "v1", "fastvideo-t2v", str(out))
                break
            except Killed:
                killed += 1
        export(shapes, "v1", "fastvideo-t2v", str(out))
        assert files(out) == whole
    assert killed == 7 + 1 + 4 + 6, "7 samples, one read for the size of a chunk, 4 files, and 6 times what is done"


def test_an_export_killed_again_and_again_comes_to_its_end(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in range(20):
        try:
            with monkeypatch.context() as patch:
                killing(patch, 5, after=bool(attempt % 2))
                export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "killed"))
            break
        except Killed:
            continue
    assert 1 < attempt < 19
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "whole"))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_is_done_is_not_read_again(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    before = files(tmp_path / "out")

    def read(sample: StoredSample) -> np.ndarray:
        raise AssertionError("a finished export reads no tensor")

    monkeypatch.setattr(Made, "latents", read)
    done = export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    assert (done.samples, done.in_folder, done.nbytes) == (7, 7, sum(map(len, before.values())))
    assert files(tmp_path / "out") == before


def test_progress_says_what_is_written_of_how_many(shapes: Storage, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export(shapes, "v1", "fastvideo-text", str(tmp_path / "out"), progress=lambda *said: seen.append(said))
    assert seen == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]


def test_the_command_says_what_was_written(shapes: Storage, tmp_path: Path) -> None:
    command = ["export", shapes.root, "--release", "v1", "--to", "fastvideo-text", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{tmp_path}/out: fastvideo-text, 7 samples of v1; ")
    said = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (said["dataset"], said["samples"], said["since"]) == ("shapes", 7, None)
    assert said["nbytes"] == sum(map(len, files(tmp_path / "out").values()))


# ---- added to


def test_a_later_release_is_added_in_new_files(shapes: Storage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(shapes, "v1", "fastvideo-t2v", str(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    done = export(shapes, "v2", "fastvideo-t2v", str(out), since="v1")
    assert (done.samples, done.in_folder, done.left) == (4, 11, 1)
    assert "1 samples that were exported before are no longer in v2" in str(done)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert ids(out) == of_release(shapes, "v1") + of_release(shapes, "v2", since=("v1",))
    assert sorted(path.name for path in out.rglob("*.parquet")) == [f"data_chunk_{n}.parquet" for n in range(6)]
    assert export(shapes, "v2", "fastvideo-t2v", str(out), since="v1") == done


@pytest.mark.parametrize("to", ["fastvideo-t2v", "causvid-lmdb", "webdataset", "hf"])
def test_a_sample_that_was_withdrawn_and_restored_comes_once(paths: Storage, tmp_path: Path, to: str) -> None:
    storage, out = Storage(str(shutil.copytree(paths.root, tmp_path / "dataset"))), str(tmp_path / "out")
    gone = next(read_samples(storage, "v1")).row["sample_id"]
    for name, where in (("without", f"verdict = 'accepted' and sample_id != '{gone}'"), ("again", None)):
        release(storage, name, where)
    whole = export(storage, "v1", to, out)
    fewer = export(storage, "without", to, out, since="v1")
    assert (fewer.samples, fewer.in_folder, fewer.left) == (0, whole.samples, 1)
    again = export(storage, "again", to, out, since="without")
    assert (again.samples, again.in_folder, again.left) == (0, whole.samples, 0)
    alone = [
        export(storage, "without", to, f"{out}-alone"),
        export(storage, "again", to, f"{out}-alone", since="without"),
    ]
    assert [(each.samples, each.left) for each in alone] == [(whole.samples - 1, 0), (1, 0)]
    nothing = export(storage, "without", to, f"{out}-of-nothing", since="v1")
    assert (nothing.samples, nothing.in_folder, nothing.left) == (0, 0, 1)


def test_an_addition_may_be_killed_too(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "killed"):
        export(shapes, "v1", "fastvideo-t2v", str(tmp_path / name))
    export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "whole"), since="v1")
    with monkeypatch.context() as patch:
        killing(patch, 4, after=True)
        with pytest.raises(Killed):
            export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "killed"), since="v1")
    export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "killed"), since="v1")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_is_new_goes_into_a_folder_of_its_own(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = export(shapes, "v2", "fastvideo-text")
    added = export(shapes, "v2", "fastvideo-text", since="v1")
    assert (whole.out, whole.samples) == ("out/export/shapes-v2-fastvideo-text", 10)
    assert (added.out, added.samples) == ("out/export/shapes-v2-fastvideo-text-since-v1", 4)
    assert ids(Path(added.out)) == of_release(shapes, "v2", since=("v1",))


def test_a_cached_list_of_files_does_not_hide_new_ones(shapes: Storage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(shapes, "v1", "fastvideo-t2v", str(out))
    caches = [
        out / "map_style_cache" / "file_info.pkl",
        out / "combined_parquet_dataset" / "map_style_cache" / "file_info.pkl",
        out / "combined_parquet_dataset" / "sharding_info_1_sp_groups_1_workers" / "shard_parquet_files.pkl",
    ]
    for cache in caches:
        cache.parent.mkdir()
        cache.write_bytes(b"of the loader")
    export(shapes, "v1", "fastvideo-t2v", str(out))
    assert all(cache.exists() for cache in caches)
    export(shapes, "v2", "fastvideo-t2v", str(out), since="v1")
    assert not any(cache.exists() for cache in caches)


# ---- refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"release": "v2"}, r"holds v1 of shapes; add to it with --since v1"),
        (
            {"to": "fastvideo-text"},
            r"holds shapes as fastvideo-t2v, not shapes as fastvideo-text; choose another folder",
        ),
        ({"to": "lerobot"}, r"--to: there is no format 'lerobot'; there are: fastvideo-t2v, "),
        ({"release": "v9"}, r"has no such release; there are: v1, v2"),
        ({"release": "v2", "since": "v9"}, r"has no such release; there are: v1, v2"),
        ({"since": "v1"}, r"--since: v1 is the release that is exported"),
        ({"out": "s3://bucket/x"}, r"--out: expected a folder of this machine, found s3://bucket/x"),
    ],
)
def test_another_export_is_refused(shapes: Storage, tmp_path: Path, arguments: dict[str, str], said: str) -> None:
    first: dict[str, str] = {"release": "v1", "to": "fastvideo-t2v", "out": str(tmp_path / "out")}
    export(shapes, **first)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=said):
        export(shapes, **first | arguments)
    assert files(tmp_path / "out") == before


def test_a_folder_of_something_else_is_refused(shapes: Storage, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and is no export"):
        export(shapes, "v1", "fastvideo-t2v", str(tmp_path))
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "notes.txt"))
    (tmp_path / "out").mkdir()
    for text in ("{", "[]", '{"version": 9}', '{"version": 1, "parts": [{}]}'):
        (tmp_path / "out" / "export.json").write_text(text)
        with pytest.raises(UserError, match="is not of this version of ditmill"):
            export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))


def test_a_release_is_known_by_more_than_its_name(
    shapes: Storage, dataset: Callable[..., Storage], tmp_path: Path
) -> None:
    other = dataset(accepted=9, rejected=0, failures=0)
    other.write_bytes("dataset.json", shapes.read_bytes("dataset.json"))
    release(other, "v1")
    release(other, "v2", "sample_id <> ''")
    export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    for arguments in ({"release": "v1"}, {"release": "v2", "since": "v1"}):
        with pytest.raises(UserError, match="holds v1 of shapes; add to it with --since v1 of the same dataset"):
            export(other, to="fastvideo-t2v", out=str(tmp_path / "out"), **arguments)


def test_half_an_export_is_not_added_to(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killing(patch, 6, after=False)
        with pytest.raises(Killed):
            export(shapes, "v1", "fastvideo-t2v", str(tmp_path / "out"))
    with pytest.raises(UserError, match="not all of it; export v1 to its end"):
        export(shapes, "v2", "fastvideo-t2v", str(tmp_path / "out"), since="v1")


def test_a_folder_has_one_writer_at_a_time(shapes: Storage, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another export is writing to"):
            export(shapes, "v1", "fastvideo-t2v", str(tmp_path))
    finally:
        os.close(handle)


def test_every_format_has_its_exporter_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FORMATS:
        assert all(callable(getattr(exporter_of(name), call)) for call in ("check", "chunk_samples", "write", "finish"))
    needy = Format("", "fastvideo:TextOnly", ("no_such_package",))
    monkeypatch.setitem(FORMATS, "needy", needy)  # type: ignore[misc]
    with pytest.raises(UserError, match="--to: needy needs no_such_package; pip install no_such_package"):
        exporter_of("needy")


def test_chunks_hold_a_sample_at_least() -> None:
    assert [samples_in(100, each) for each in (1000, 100, 30, 0)] == [1, 1, 3, 100]
    assert samples_in(10**9, 1) == 1000


# ---- read back


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


@pytest.fixture(scope="module")
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
