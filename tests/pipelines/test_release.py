from __future__ import annotations

import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.commit import Committer, write_part
from infra.control import live_runs
from infra.errors import UserError
from infra.schema import SAMPLES
from infra.storage import Storage
from infra.tables import Table
from pipelines import release as releases
from pipelines.annotate import label, rejudge, withdraw
from pipelines.decisions import DECIDED, NONE, Decision, apply, decided, read_decisions
from pipelines.release import list_releases, read_release, release
from pipelines.verify import verify
from stages.write import sidecar


def rows_of(storage: Storage, made: releases.Released) -> list[dict[str, Any]]:
    parts = [item["path"] for item in made.files if item["path"].endswith(".parquet")]
    return [row for path in parts for row in pq.read_table(io.BytesIO(storage.read_bytes(path))).to_pylist()]


def samples(storage: Storage) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for row in Table(storage, "samples").read().to_pylist()}


def plain_rows(storage: Storage, count: int, run_id: str = "20260101t000000-aaaaaa", **columns: list[Any]) -> None:
    """Samples without media."""
    rows = [
        {
            "sample_id": hashlib.md5(f"{run_id}/{at}".encode()).hexdigest(),
            "run_id": run_id,
            "verdict": "accepted",
            "split": "validation" if at % 10 == 0 else "train",
            "media": [],
            "tensors": [],
            "cost": [{"stage": "sample", "accelerator_seconds": 0.5, "cpu_seconds": 0.25}],
            **{name: values[at] for name, values in columns.items()},
        }
        for at in range(count)
    ]
    committer = Committer(Table(storage, "samples"), run_id)
    committer.commit([write_part(storage, f"samples/{run_id}-0.parquet", pa.Table.from_pylist(rows, SAMPLES))])


# ---- decisions


def test_apply_leaves_untouched_rows_as_they_are(generated):
    table = Table(generated().storage, "samples").read()
    for batch in table.to_batches():
        assert apply(batch, {}).select(SAMPLES.names) == batch
        assert apply(batch, {}).column("label").to_pylist() == [""] * batch.num_rows
        assert apply(batch, {}).schema == DECIDED


def test_apply_changes_what_was_decided():
    row = dict.fromkeys(SAMPLES.names) | {
        "sample_id": "a",
        "verdict": "accepted",
        "judge": "first",
        "scores": [{"name": "motion", "value": 1.0}, {"name": "prompt_match", "value": 0.9}],
        "captions": [
            {"style": style, "language": "en", "scene": 0, "text": style, "model": "m"} for style in ("short", "dense")
        ],
        "caption": "short",
        "tags": ["x"],
        "prompt": "a cat",
    }
    decision = Decision(
        verdict="rejected",
        decided_by="second",
        rubric="r+b",
        reasons=("prompt_match 0.1 < 0.5",),
        captions={"short": "new", "long": "longer"},
        captioned_by={"short": ("c", ""), "long": ("c", "")},
        scores={"prompt_match": 0.1, "beauty": 0.3},
        tags=("y", "x"),
        label="n",
    )
    (new,) = apply(pa.RecordBatch.from_pylist([row], SAMPLES), {"a": decision}).to_pylist()
    assert (new["verdict"], new["judge"], new["rubric"]) == ("rejected", "second", "r+b")
    assert new["reasons"] == ["prompt_match 0.1 < 0.5"]
    assert {item["name"]: item["value"] for item in new["scores"]} == {
        "motion": 1.0,
        "prompt_match": 0.1,
        "beauty": 0.3,
    }
    assert [(item["style"], item["text"], item["model"]) for item in new["captions"]] == [
        ("short", "new", "c"),
        ("dense", "dense", "m"),
        ("long", "longer", "c"),
    ]
    assert (new["caption"], new["tags"], new["label"], new["prompt"]) == ("new", ["x", "y"], "n", "a cat")
    assert decided(row, NONE) == row | {"label": ""}


def test_captions_of_scenes_are_decided_apart_and_an_empty_one_is_none():
    def caption(style: str, scene: int, text: str, model: str = "m") -> dict:
        return {"style": style, "language": "en", "scene": scene, "text": text, "model": model}

    row = {
        "caption": "old",
        "captions": [caption("short", 0, "old"), caption("short", 1, "one"), caption("tags", 0, "x")],
    }
    texts = {"short": "", "short/1": "first", "dense/2": "second", "a/b": "c", "dense": "all"}
    decision = Decision(captions=texts, captioned_by=dict.fromkeys(texts, ("c", "")))
    new = decided(row, decision)
    assert new["captions"] == [
        caption("short", 1, "first", "c"),
        caption("tags", 0, "x"),
        caption("dense", 2, "second", "c"),
        caption("a/b", 0, "c", "c"),
        caption("dense", 0, "all", "c"),
    ]
    assert new["caption"] == "x"
    gone = Decision(captions={"short": ""}, captioned_by={"short": ("c", "")})
    assert decided({"caption": "old", "captions": [caption("short", 0, "old")]}, gone) | {"label": 0} == {
        "caption": "",
        "captions": [],
        "label": 0,
    }


def test_apply_drops_what_is_withdrawn():
    batch = pa.RecordBatch.from_pylist([{"sample_id": at} for at in "abc"], pa.schema([("sample_id", pa.string())]))
    assert apply(batch, {"b": Decision(withdrawn=True)}).column("sample_id").to_pylist() == ["a", "c"]


# ---- releases


def test_release_holds_accepted_samples_and_says_what_it_is(generated):
    storage = generated().storage
    made = release(storage, "v1")
    rows = {row["sample_id"]: row for row in rows_of(storage, made)}
    accepted = {at: row for at, row in samples(storage).items() if row["verdict"] == "accepted"}
    assert rows == {at: row | {"label": ""} for at, row in accepted.items()}
    assert made.rows == sum(made.counts["split"].values()) == made.counts["verdict"]["accepted"] == 4
    assert made.versions["samples"] == Table(storage, "samples").handle().version()
    assert made.cost["cpu_seconds"] == pytest.approx(
        sum(cost["cpu_seconds"] for row in accepted.values() for cost in row["cost"]), abs=1e-3
    )
    assert {licence["model"] for licence in made.licences} == {"pack://tiny"}
    for item in made.files:
        data = storage.read_bytes(item["path"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (item["nbytes"], item["sha256"])
    assert read_release(storage, "v1") == made
    assert set(storage.files("releases")) == {"releases/v1/manifest.json", *(item["path"] for item in made.files)}
    assert live_runs(storage) == []


def test_release_applies_annotations_and_leaves_out_what_is_withdrawn(generated, tmp_path):
    run = generated(judge={"thresholds": {"prompt_match": 0.9, "no_artefacts": 0.0, "motion_smooth": 0.0}})
    storage = run.storage
    before = release(storage, "before")
    rejudge(run, lambda: None)
    now = {at: one.verdict for at, one in read_decisions(storage).items()}
    verdicts = {at: now.get(at) or row["verdict"] for at, row in samples(storage).items()}
    accepted = [at for at, verdict in verdicts.items() if verdict == "accepted"]
    assert set(accepted) != {row["sample_id"] for row in rows_of(storage, before)}
    withdraw(storage, accepted[:1], "asked to be removed")
    (tmp_path / "labels.csv").write_text(f"sample_id,label\n{accepted[1]},y\n")
    label(storage, str(tmp_path / "labels.csv"))
    rows = {row["sample_id"]: row for row in rows_of(storage, release(storage, "after"))}
    assert set(rows) == set(accepted[1:])
    assert all(row["rubric"] == run.rubric_id for at, row in rows.items() if now.get(at))
    assert rows[accepted[1]]["label"] == "y"
    everything = rows_of(storage, release(storage, "all", where="true"))
    assert accepted[0] not in {row["sample_id"] for row in everything}
    assert len(everything) == 5
    assert {row["sample_id"] for row in rows_of(storage, read_release(storage, "before"))} >= set(accepted[:1])


@pytest.mark.parametrize(
    ("where", "meets"),
    [
        ("score.prompt_match > 0.5", [0, 2]),
        ('score."prompt-match" is not null', [1]),
        ("score['prompt_match'] between 0.8 and 1", [0]),
        ("score.prompt_match > 0.5 AND NOT array_has(tags, 'b')", [0]),
        ("score.prompt_match is null", [1, 3]),
        ("verdict <> 'accepted'", [3]),
        ("num_frames >= 9 or caption like '%cat%'", [1, 2]),
        ("caption = 'a cat' and label = ''", [1]),
        ("array_length(reasons) > 0", [3]),
        ("created_at > '2026-06-01' -- new ones", [2]),
        ("tags[1] = 'b' and split = 'train'", [2]),
        ("split in ('validation')", [0]),
    ],
)
def test_release_where(tmp_path, where, meets):
    storage = Storage(str(tmp_path))
    score = [[{"name": "prompt_match", "value": value}] for value in (0.9, None, 0.7, None)]
    score[1] = [{"name": "prompt-match", "value": 1.0}]
    from datetime import UTC, datetime

    plain_rows(
        storage,
        4,
        scores=score,
        verdict=["accepted", "accepted", "accepted", "rejected"],
        tags=[["a"], [], ["b"], None],
        num_frames=[1, 1, 9, 5],
        caption=["a dog", "a cat", "", ""],
        reasons=[[], [], [], ["static"]],
        created_at=[datetime(2026, month, 1, tzinfo=UTC) for month in (1, 2, 7, 3)],
        height=[64, 64, 64, 64],
    )
    ids = [hashlib.md5(f"20260101t000000-aaaaaa/{at}".encode()).hexdigest() for at in meets]
    assert {row["sample_id"] for row in rows_of(storage, release(storage, "v1", where))} == set(ids)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nothing = 1", "No field named nothing.* The columns are: sample_id"),
        ("score.nothing > 1", "no sample has a score 'nothing'; there are: prompt_match"),
        ("verdict", "non-boolean"),
        ("verdict =", "Expected: an expression, found its end$"),
        ("verdict = 'accepted'; drop table samples", "where: "),
        ("1 = 1) union (select 'x'", "expected one condition"),
        ("score.prompt_match > 'high'", "Cannot cast"),
        ("verdict = 'nothing'", "no sample meets"),
    ],
)
def test_release_refuses_a_wrong_condition_in_one_line(tmp_path, where, said):
    storage = Storage(str(tmp_path))
    plain_rows(storage, 1, scores=[[{"name": "prompt_match", "value": 0.5}]])
    with pytest.raises(UserError, match=said) as error:
        release(storage, "v1", where)
    assert "\n" not in str(error.value)
    assert list(storage.files("releases")) == []
    assert live_runs(storage) == []


@pytest.mark.parametrize("name", ["", "v1.0", "a/b", "..", "V1", "-x"])
def test_release_refuses_a_name_that_loaders_stumble_over(tmp_path, name):
    with pytest.raises(UserError, match="expected a name"):
        release(Storage(str(tmp_path)), name)


def test_release_of_an_empty_dataset(tmp_path):
    with pytest.raises(UserError, match="no sample meets"):
        release(Storage(str(tmp_path)), "v1")


def test_release_never_changes(storage):
    plain_rows(storage, 3)
    made = release(storage, "v1")
    plain_rows(storage, 5, run_id="20260102t000000-bbbbbb")
    with pytest.raises(UserError, match="a release never changes"):
        release(storage, "v1")
    assert read_release(storage, "v1") == made
    assert len(rows_of(storage, made)) == 3
    assert release(storage, "v2").rows == 8
    assert [found.name for found in list_releases(storage)] == ["v1", "v2"]
    with pytest.raises(UserError, match="there are: v1, v2"):
        read_release(storage, "v3")


def test_release_of_one_name_by_two_at_once(storage):
    plain_rows(storage, 3)

    def attempt(_: int) -> releases.Released | None:
        try:
            return release(storage, "v1")
        except UserError:
            return None

    with ThreadPoolExecutor(2) as pool:
        made = [found for found in pool.map(attempt, range(2)) if found]
    assert len(made) == 1
    assert read_release(storage, "v1") == made[0]
    assert set(storage.files("releases")) == {"releases/v1/manifest.json", *(item["path"] for item in made[0].files)}


def test_release_that_died_counts_for_nothing_and_is_cleaned_up(storage, monkeypatch):
    plain_rows(storage, 3)
    with monkeypatch.context() as killed:

        def die(*_):
            raise SystemExit("killed")

        killed.setattr(Storage, "create_bytes", die)
        killed.setattr(Storage, "delete", lambda *_: None)  # a killed process cleans up nothing
        with pytest.raises(SystemExit):
            release(storage, "v1")
    left = set(storage.files("releases"))
    assert len(left) == 2
    assert list_releases(storage) == []
    for beat in live_runs(storage):
        storage.write_bytes(f"control/{beat.run_id}.json", json.dumps(vars(replace(beat, renewed_at=0.0))).encode())
    made = release(storage, "v1")
    assert left.isdisjoint(storage.files("releases"))
    assert made.rows == 3


def test_release_streams_parts_of_each_split(tmp_path, monkeypatch):
    monkeypatch.setattr(releases, "PART_ROWS", 7)
    storage = Storage(str(tmp_path))
    plain_rows(storage, 30)
    made = release(storage, "v1")
    names = [item["path"].rsplit("/", 1)[-1].rsplit("-", 1)[0] for item in made.files]
    assert names == [*(f"train-{at:05d}" for at in range(4)), "validation-00000"]
    assert [item["rows"] for item in made.files] == [7, 7, 7, 6, 3]
    assert len({row["sample_id"] for row in rows_of(storage, made)}) == 30


@pytest.mark.parametrize("how", ["byte", "length", "gone"])
def test_verify_finds_a_release_that_was_changed(generated, how):
    storage = generated().storage
    made = release(storage, "v1")
    assert list(verify(storage)) == []
    path = made.files[0]["path"]
    data = bytearray(storage.read_bytes(path))
    data[len(data) // 2] ^= 1
    if how == "gone":
        storage.delete(path)
    else:
        storage.write_bytes(path, bytes(data if how == "byte" else data[:-1]))
    assert [(found.kind, found.where) for found in verify(storage)] == [("release_changed", path)]
    assert list(verify(storage, read_media=False)) == ([] if how == "byte" else list(verify(storage)))


# ---- packs


def test_release_packs_media_into_few_tars(generated):
    storage = generated().storage
    rows = {row["sample_id"]: row for row in rows_of(storage, release(storage, "plain"))}
    nbytes = {at: sum(item["nbytes"] for item in (*row["media"], *row["tensors"])) for at, row in rows.items()}
    made = release(storage, "packed", pack_bytes=int(1.5 * max(nbytes.values())))
    tars = [item["path"] for item in made.files if item["path"].endswith(".tar")]
    assert 1 < len(tars) < len(rows)
    assert all(path.startswith("releases/packed/media/train-") for path in tars)
    for row in rows_of(storage, made):
        old = rows[row["sample_id"]]
        for item, before in zip((*row["media"], *row["tensors"]), (*old["media"], *old["tensors"]), strict=True):
            data = storage.read_bytes(item["shard"], item["offset"], item["offset"] + item["nbytes"])
            assert item["shard"] in tars
            assert hashlib.sha256(data).hexdigest() == item["sha256"] == before["sha256"]
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(row["media"][0]["shard"]))) as tar:
            names = tar.getnames()
            assert names == sorted(names, key=lambda name: name.split("."))
            assert tar.extractfile(f"{row['sample_id']}.json").read() == sidecar(row)


def test_release_packs_the_same_bytes_again(generated):
    storage = generated().storage
    packs = [release(storage, name, pack_bytes=10**6) for name in ("a", "b")]
    hashes = [[item["sha256"] for item in made.files if item["path"].endswith(".tar")] for made in packs]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 1


def test_release_packs_captions_as_they_are_now(generated):
    storage = generated().storage
    at = next(at for at, row in samples(storage).items() if row["verdict"] == "accepted")
    from stages.annotate import Annotator

    who = Annotator(storage, "20260101t000000-cccccc", "a person")
    rows = who.captions(at, [{"style": "short", "text": "a red cat sits"}])
    committer = Committer(Table(storage, "annotations"), who.run_id)
    committer.commit([who.write(rows, 0)])
    made = release(storage, "v1", pack_bytes=10**9)
    (tar,) = (item["path"] for item in made.files if item["path"].endswith(".tar"))
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(tar))) as members:
        assert json.loads(members.extractfile(f"{at}.json").read())["caption"] == "a red cat sits"


def test_release_refuses_to_pack_what_was_changed(generated):
    storage = generated().storage
    row = next(row for row in samples(storage).values() if row["verdict"] == "accepted")
    item = row["media"][0]
    data = bytearray(storage.read_bytes(item["shard"]))
    data[item["offset"] + 40] ^= 1
    storage.write_bytes(item["shard"], bytes(data))
    with pytest.raises(UserError, match=f"sample {row['sample_id']}.*sha256"):
        release(storage, "v1", pack_bytes=10**9)
    assert list(storage.files("releases")) == []
    assert (
        release(
            storage, "v1", where=f"verdict = 'accepted' and sample_id <> '{row['sample_id']}'", pack_bytes=10**9
        ).rows
        == 3
    )


def test_release_packs_on_object_storage(generated, s3_endpoint):
    local = generated().storage
    remote = Storage("s3://bucket/packed", s3_endpoint, allow_http=True)
    for name in local.files():
        remote.write_bytes(name, local.read_bytes(name))
    made = release(remote, "v1", pack_bytes=10**9)
    here = release(local, "v1", pack_bytes=10**9)
    assert [item["sha256"] for item in made.files if item["path"].endswith(".tar")] == [
        item["sha256"] for item in here.files if item["path"].endswith(".tar")
    ]
    assert {row["sample_id"] for row in rows_of(remote, made)} == {row["sample_id"] for row in rows_of(local, here)}


def test_release_is_read_by_other_libraries(generated, tmp_path):
    import datasets
    import webdataset

    storage = generated().storage
    made = release(storage, "v1", pack_bytes=10**9)
    folder = Path(storage.path(made.folder))
    found = datasets.load_dataset(str(folder), data_files="*.parquet", cache_dir=str(tmp_path / "cache"))
    assert sum(len(split) for split in found.values()) == 4
    by_file = datasets.load_dataset(
        "parquet", data_files={"train": str(folder / "train-*.parquet")}, cache_dir=str(tmp_path / "cache")
    )
    assert by_file["train"][0]["media"][0]["shard"].startswith("releases/v1/media/")
    tars = [str(path) for path in folder.glob("media/*.tar")]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert len(keys) == 4
