"""Exports to CausVid's LMDB, WebDataset and the Hugging Face hub: read back by readers of their own, and cut short."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import yaml

from infra.errors import UserError
from infra.storage import Storage
from pipelines import export as exports
from pipelines.export import export
from pipelines.exporters import causvid, hf, webdataset
from pipelines.release import read_release, release
from pipelines.samples import StoredSample, Trajectory, read_samples

STEPS, LATENT = 4, (3, 2, 4, 4)
TIMESTEPS = (1000.0, 900.5, 750.25, 500.0, 0.0)
PROMPTS = (
    "",
    "une forme \u202e 形 🟥 \"'`|\\ \x00 end",
    "a red circle",
    "two\nlines, a tab\t and ../../etc/passwd",
    "a blue square",
)
"""None of them may become part of a name."""


def text_id(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


@dataclass(frozen=True)
class Made(StoredSample):
    """A sample whose tensors are drawn from its id, and whose media are those of the dataset."""

    def _draw(self, what: str, *shape: int, of: str = "sample_id") -> np.ndarray:
        seed = int(text_id(str(self.row[of]))[:8], 16)
        return np.random.default_rng([seed, *what.encode()]).standard_normal(shape, np.float32)

    def _states(self) -> np.ndarray:
        drawn = self._draw("states", STEPS + 1, *LATENT)
        return drawn.astype(np.float16).astype(np.float32)  # as if it had been stored so

    def latents(self) -> np.ndarray:
        return self._states()[-1]

    def noise(self) -> np.ndarray:
        return self._states()[0]

    def trajectory(self) -> Trajectory:
        return Trajectory(self._states(), tuple(range(STEPS + 1)), TIMESTEPS, tuple(t / 1000 for t in TIMESTEPS), STEPS)

    def text(self) -> dict[str, np.ndarray]:
        tokens = 3 + len(str(self.row["prompt"])) % 4
        drawn = {"prompt_embeds": self._draw("text", tokens, 6, of="prompt"), "pooled": self._draw("p", 5, of="prompt")}
        return {**drawn, "prompt_embeds_mask": np.ones(tokens, np.int64)}

    def negative_text(self) -> dict[str, np.ndarray]:
        return Made(self.storage, dict(self.row) | {"prompt": self.row["negative_prompt"]}).text()

    def media(self) -> tuple[bytes, str]:
        item = self.row["media"][0]
        start = item["offset"]
        data = self.storage.read_bytes(item["shard"], start, start + item["nbytes"])
        return data, item["member"].rpartition(".")[2]


@dataclass(frozen=True)
class AfterSteps(Made):
    """Chosen states without the noise and without the final latent."""

    def trajectory(self) -> Trajectory:
        whole = super().trajectory()
        return Trajectory(whole.states[1:4], (1, 2, 3), TIMESTEPS[1:4], whole.sigmas[1:4], STEPS)


def tensor(role: str, *shape: int, dtype: str = "float16") -> dict[str, Any]:
    return {"role": role, "dtype": dtype, "shape": list(shape), "nbytes": 2 * int(np.prod(shape))}


LATENTS, STATES = tensor("latents", *LATENT), tensor("trajectory", STEPS + 1, *LATENT)


def rows(storage: Storage, name: str) -> Iterator[dict[str, Any]]:
    found = [
        row
        for item in read_release(storage, name).files
        for row in pq.read_table(io.BytesIO(storage.read_bytes(item["path"]))).to_pylist()
    ]
    for row in sorted(found, key=lambda row: row["sample_id"]):
        at = int(row["sample_id"][:8], 16) % len(PROMPTS)
        prompt, negative = PROMPTS[at], "blurred"
        ids = {"text_id": text_id(prompt), "negative_text_id": text_id(negative)}
        yield row | {
            "prompt": prompt,
            "negative_prompt": negative,
            "split": "validation" if at == 3 else "train",
            "num_inference_steps": STEPS,
            "tensors": [LATENTS, STATES],
            "extra_json": json.dumps(ids),
        }


def stored_as(kind: type[StoredSample], **columns: Any) -> Callable[..., Iterator[StoredSample]]:
    """A read_samples whose samples are of `kind`, with these columns."""

    def read_samples(storage: Storage, name: str, *, since: tuple[str, ...] = ()) -> Iterator[StoredSample]:
        known = {row["sample_id"] for earlier in since for row in rows(storage, earlier)}
        for row in rows(storage, name):
            if row["sample_id"] not in known:
                yield kind(storage, row | columns)

    return read_samples


@pytest.fixture(scope="module")
def made_once(dataset: Callable[..., Storage]) -> Storage:
    """Releases v1, of 7 samples, and v2, of the same and 4 more."""
    storage = dataset(accepted=7, rejected=4, failures=0)
    said = {"name": "shapes", "tensors": {"latents": "float16", "text_embeddings": "float32"}}
    storage.write_bytes("dataset.json", json.dumps(said).encode())
    release(storage, "v1")
    release(storage, "v2", "verdict in ('accepted', 'rejected')")
    return storage


@pytest.fixture
def shapes(made_once: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """That dataset; an export only reads it. Three samples a chunk."""
    monkeypatch.setattr(exports, "read_samples", stored_as(Made))
    for module in (causvid, hf, webdataset):
        monkeypatch.setattr(module, "samples_in", lambda *sizes: 3)
    return made_once


def samples(storage: Storage, name: str = "v1") -> list[StoredSample]:
    return list(stored_as(Made)(storage, name))


# ---- all formats: cut short anywhere, added to

TO = ("causvid-lmdb", "self-forcing-lmdb", "webdataset", "hf")


def content(folder: Path) -> dict[str, Any]:
    """What readers see of each file: of an LMDB its items, because its bytes tell of transactions, too."""
    return {
        str(path.relative_to(folder)): items(path.parent) if path.name == "data.mdb" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def items(folder: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


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
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    out, photographs = tmp_path / "whole", tmp_path / "photographs"
    with monkeypatch.context() as patch:
        photographing(patch, out, photographs)
        export(shapes, "v1", to, str(out))
    whole = content(out)
    assert not [name for name in whole if name.endswith(".tmp")]
    taken = sorted(photographs.iterdir())
    assert len(taken) >= 2 * (7 + 4), "each sample's states, and what is done after the look at the rows and each chunk"
    for photograph in taken:
        export(shapes, "v1", to, str(photograph))
        assert content(photograph) == whole, photograph.name


@pytest.mark.parametrize("to", TO)
def test_a_later_release_is_added_and_leaves_what_is_there(shapes: Storage, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    export(shapes, "v1", to, str(out))
    before = content(out)
    done = export(shapes, "v2", to, str(out), since="v1")
    assert (done.samples, done.in_folder) == (4, 11)
    after = content(out)
    for name, held in before.items():
        if isinstance(held, dict):
            assert {key: value for key, value in held.items() if not key.endswith(b"_shape")}.items() <= after[
                name
            ].items()
        elif name not in ("export.json", "README.md"):
            assert after[name] == held
    added = [sample.row["sample_id"] for sample in stored_as(Made)(shapes, "v2", since=("v1",))]
    if to.endswith("lmdb"):
        keys = {path.parent: items(path.parent) for path in (out / "lmdb").rglob("data.mdb")}
        assert sum(int(held[b"prompts_shape"]) for held in keys.values()) == 11
        ids = {value.decode() for held in keys.values() for key, value in held.items() if key.startswith(b"ids_")}
        assert set(added) <= ids
    export(shapes, "v2", to, str(out), since="v1")
    assert content(out) == after


# ---- CausVid and Self-Forcing


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


def test_causvid_reads_states_from_noise_to_final_latent_frames_first(shapes: Storage, tmp_path: Path) -> None:
    export(shapes, "v1", "causvid-lmdb", str(tmp_path))
    found = LmdbReader(tmp_path / "lmdb")
    assert found.shape == (7, STEPS + 1, 2, 3, 4, 4)
    for at, sample in enumerate(samples(shapes)):
        prompt, states = found[at]
        assert prompt == sample.row["prompt"]
        assert np.array_equal(states, sample.trajectory().states.swapaxes(1, 2))
        assert np.array_equal(states[0].swapaxes(0, 1), sample.noise())
        assert np.array_equal(states[-1].swapaxes(0, 1), sample.latents())
    told = {"places": [0, 1, 2, 3, 4], "num_inference_steps": 4, "timesteps": list(TIMESTEPS)}
    assert told.items() <= found.said("states").items()
    assert sum(found[at][0] == "a red circle" for at in range(7)) == 2, "one prompt, two samples, two rows"


def test_causvid_is_given_the_noise_and_the_final_latent_where_they_were_not_kept(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(shapes, "v1", "causvid-lmdb", str(tmp_path / "all"))
    monkeypatch.setattr(exports, "read_samples", stored_as(AfterSteps))
    export(shapes, "v1", "causvid-lmdb", str(tmp_path / "chosen"))
    whole, chosen = LmdbReader(tmp_path / "all" / "lmdb"), LmdbReader(tmp_path / "chosen" / "lmdb")
    assert all(np.array_equal(whole[at][1], chosen[at][1]) for at in range(7))
    assert chosen.said("states")["timesteps"] == [None, 900.5, 750.25, 500.0, 0.0]


def test_clean_latents_are_rows_of_one_state(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, tensors=[LATENTS]))
    export(shapes, "v1", "causvid-lmdb", str(tmp_path))
    found = LmdbReader(tmp_path / "lmdb")
    assert found.shape == (7, 2, 3, 4, 4)
    for at, sample in enumerate(samples(shapes)):
        assert found[at][1].shape == (1, 2, 3, 4, 4)
        assert np.array_equal(found[at][1][0].swapaxes(0, 1), sample.latents())


@dataclass(frozen=True)
class Image(Made):
    def trajectory(self) -> Trajectory:
        whole = super().trajectory()
        return Trajectory(whole.states[:, :, 0], whole.places, whole.timesteps, whole.sigmas, whole.steps)


def test_an_image_is_a_video_of_one_frame(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = tensor("trajectory", STEPS + 1, 3, 4, 4)
    monkeypatch.setattr(exports, "read_samples", stored_as(Image, tensors=[states]))
    export(shapes, "v1", "causvid-lmdb", str(tmp_path))
    found = LmdbReader(tmp_path / "lmdb")
    assert found.shape == (7, STEPS + 1, 1, 3, 4, 4)
    assert np.array_equal(found[0][1][:, 0], samples(shapes)[0].trajectory().states[:, :, 0])


def test_self_forcing_reads_shards_that_may_be_empty(shapes: Storage, tmp_path: Path) -> None:
    export(shapes, "v1", "self-forcing-lmdb", str(tmp_path / "out"))
    export(shapes, "v2", "self-forcing-lmdb", str(tmp_path / "out"), since="v1")
    folder = tmp_path / "out" / "lmdb"
    assert {path.name for path in folder.iterdir()} == {f"shard_{k}" for k in range(16)}, (
        "the reader opens all it finds"
    )
    order = samples(shapes) + list(stored_as(Made)(shapes, "v2", since=("v1",)))
    for shard in range(16):
        found = LmdbReader(folder / f"shard_{shard}")
        assert found.shape == (int(shard < len(order)), STEPS + 1, 2, 3, 4, 4)
        for at in range(len(found)):
            assert np.array_equal(found[at][1], order[16 * at + shard].trajectory().states.swapaxes(1, 2))


def test_a_map_that_is_full_is_doubled(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causvid, "MAP_NBYTES", 16 << 10)
    export(shapes, "v1", "causvid-lmdb", str(tmp_path / "small"))
    monkeypatch.undo()
    monkeypatch.setattr(exports, "read_samples", stored_as(Made))
    export(shapes, "v1", "causvid-lmdb", str(tmp_path / "large"))
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
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Made], columns: Any, said: str
) -> None:
    monkeypatch.setattr(exports, "read_samples", stored_as(kind, **columns))
    with pytest.raises(UserError, match=said):
        export(shapes, "v1", "causvid-lmdb", str(tmp_path))


def test_several_shapes_are_refused_before_the_first_row(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed(storage: Storage, name: str, *, since: str | None = None) -> Iterator[StoredSample]:
        for at, sample in enumerate(stored_as(Made)(storage, name)):
            other = {"tensors": [tensor("trajectory", STEPS + 1, 3, 4, 4, 4)]}
            yield sample if at < 5 else Made(storage, dict(sample.row) | other)

    monkeypatch.setattr(exports, "read_samples", mixed)
    with pytest.raises(UserError, match=r"of one kind.*--where \"verdict = 'accepted' and height = 64 and width = 64"):
        export(shapes, "v1", "causvid-lmdb", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_causvid_and_fastvideo_hold_the_same_states(shapes: Storage, tmp_path: Path) -> None:
    """CausVid's state k is what step k starts from, FastVideo's what it has made: one further on."""
    for to in ("causvid-lmdb", "fastvideo-ode"):
        export(shapes, "v1", to, str(tmp_path / to))
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


# ---- WebDataset


def test_webdataset_reads_each_sample_whole(shapes: Storage, tmp_path: Path) -> None:
    export(shapes, "v1", "webdataset", str(tmp_path))
    tars = sorted(str(path) for path in tmp_path.glob("*.tar"))
    names = ["train-000000", "train-000001", "train-000002", "validation-000000"]
    assert [Path(tar).stem for tar in tars] == names, "numbers of a split have no gaps"
    found = {item["__key__"]: item for item in wds.WebDataset(tars, shardshuffle=False).decode()}
    assert sorted(found) == [sample.row["sample_id"] for sample in samples(shapes)]
    for sample in samples(shapes):
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
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = {"tensors": [], "extra_json": "{}", "caption": ""}
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, **bare))
    export(shapes, "v1", "webdataset", str(tmp_path))
    found = {
        item["__key__"]: item for item in wds.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False)
    }
    for sample in samples(shapes):
        item = found[str(sample.row["sample_id"])]
        assert {key for key in item if not key.startswith("__")} == {"json", "txt", "mp4"}
        assert item["mp4"] == sample.media()[0]
        assert item["txt"].decode() == sample.row["prompt"]


def test_a_prompt_without_media_is_a_sample_too(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, tensors=[], media=[]))
    export(shapes, "v1", "webdataset", str(tmp_path / "tars"))
    first = next(iter(wds.WebDataset(str(tmp_path / "tars" / "train-000000.tar"), shardshuffle=False).decode()))
    assert {key for key in first if not key.startswith("__")} == {
        "json", "txt", "text.npy", "pooled.npy", "promptembedsmask.npy",
    }  # fmt: skip
    export(shapes, "v1", "hf", str(tmp_path / "hub"))
    assert {path.name for path in (tmp_path / "hub").iterdir() if path.is_dir()} == {"samples", "embeddings"}


# ---- the Hugging Face hub


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """load_dataset with no network and a cache of its own."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return datasets.load_dataset


def test_hub_folder_loads_each_config(shapes: Storage, tmp_path: Path, load: Callable[..., Any]) -> None:
    import datasets

    export(shapes, "v1", "hf", str(tmp_path))
    header = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    configs = [config["config_name"] for config in header["configs"]]
    assert configs == ["samples", "videos", "latents", "trajectories", "embeddings"]
    assert header["size_categories"] == ["n<1K"] and header["task_categories"] == ["text-to-video"]
    loaded = {config: load(str(tmp_path), config) for config in configs}
    made = {str(sample.row["sample_id"]): sample for sample in samples(shapes)}
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


def test_hub_folder_holds_each_text_once(shapes: Storage, tmp_path: Path, load: Callable[..., Any]) -> None:
    import datasets

    export(shapes, "v1", "hf", str(tmp_path))
    export(shapes, "v2", "hf", str(tmp_path), since="v1")
    train = load(str(tmp_path), "embeddings")["train"]
    assert train.features["prompt_embeds"] == datasets.Array2D((None, 6), "float32")
    expected = {sample.row["prompt"] for sample in stored_as(Made)(shapes, "v2") if sample.row["split"] == "train"}
    assert sorted(train["text"]) == sorted({*expected, "blurred"})
    by_text = {sample.row["prompt"]: sample for sample in samples(shapes, "v2")}
    for row in train.with_format("numpy"):
        assert row["text_id"] == text_id(row["text"])
        if row["text"] != "blurred":
            text = by_text[str(row["text"])].text()  # type: ignore[attr-defined]
            assert np.array_equal(row["prompt_embeds"], text["prompt_embeds"])
            assert np.array_equal(row["pooled"], text["pooled"])


def test_texts_are_of_the_type_that_the_dataset_keeps(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    for module in (hf, webdataset):
        monkeypatch.setattr(module, "text_dtype", lambda storage: "float16")
    export(shapes, "v1", "hf", str(tmp_path / "hub"))
    export(shapes, "v1", "webdataset", str(tmp_path / "tars"))
    text = next(one for one in samples(shapes) if one.row["split"] == "train").text()
    row = next(iter(load(str(tmp_path / "hub"), "embeddings", split="train").with_format("arrow").iter(1)))
    item = next(iter(wds.WebDataset(str(tmp_path / "tars" / "train-000000.tar"), shardshuffle=False).decode()))
    assert row.schema.field("pooled").type.value_type == "halffloat" and item["pooled.npy"].dtype == np.float16
    half = text["pooled"].astype(np.float16)
    assert np.array_equal(row["pooled"][0].values.to_numpy(), half) and np.array_equal(item["pooled.npy"], half)
    assert item["promptembedsmask.npy"].dtype == np.int64


def test_hub_folder_keeps_shapes_apart(
    shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    @dataclass(frozen=True)
    class Wide(Made):
        def latents(self) -> np.ndarray:
            return self._draw("latents", 3, 2, 4, 6)

    def mixed(storage: Storage, name: str, *, since: str | None = None) -> Iterator[StoredSample]:
        for at, row in enumerate(rows(storage, name)):
            yield (Wide if at % 2 else Made)(storage, row | {"tensors": [LATENTS]})

    monkeypatch.setattr(exports, "read_samples", mixed)
    export(shapes, "v1", "hf", str(tmp_path))
    shape = {
        name: load(str(tmp_path), name, split="train").features["latents"].shape for name in ("latents", "latents-2")
    }
    assert shape == {"latents": (3, 2, 4, 4), "latents-2": (3, 2, 4, 6)}


def test_hub_folder_of_images(
    made_once: Storage, tmp_path: Path, dataset: Callable[..., Storage], load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    storage = dataset(accepted=3, rejected=0, failures=0, num_frames=1)
    storage.write_bytes("dataset.json", json.dumps({"name": "pictures"}).encode())
    release(storage, "v1")
    monkeypatch.setattr(exports, "read_samples", stored_as(Made, tensors=[], extra_json="{}"))
    export(storage, "v1", "hf", str(tmp_path))
    images = load(str(tmp_path), "images", split="train")
    assert images[0]["image"].size == (64, 64)


def test_rows_go_out_in_groups(shapes: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "GROUP_NBYTES", 1)
    export(shapes, "v1", "hf", str(tmp_path))
    assert pq.ParquetFile(tmp_path / "latents" / "train-000000.parquet").num_row_groups == 3


# ---- of a dataset that the stages made


@pytest.fixture(scope="module")
def paths(generate_from: Callable[..., Path]) -> Storage:
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


def test_a_generated_dataset_is_exported_bit_for_bit(paths: Storage, tmp_path: Path, load: Callable[..., Any]) -> None:
    made = list(read_samples(paths, "v1"))
    assert 0 < len(made) < 6
    for to in TO:
        assert export(paths, "v1", to, str(tmp_path / to)).samples == len(made)
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
