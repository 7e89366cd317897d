"""Releases that are held to rules, of rendered clips and of copies of them that are nearly the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.schema import ANNOTATIONS, RUNS, SAMPLES
from infra.storage import Storage
from infra.tables import Table
from pipelines.annotate import withdraw
from pipelines.release import release
from pipelines.select import _patterns, _words
from pipelines.verify import verify
from tests.pipelines.rendered import again, brighter, names, rules, sample_id, scenes, shifted, store

NEAR = {"near_duplicates": {"hash": 6}}


@pytest.fixture(scope="session")
def clips() -> np.ndarray:
    return scenes()


@pytest.mark.parametrize("change", [again, shifted, brighter])
def test_of_copies_that_are_nearly_the_same_one_stays(tmp_path, clips, change):
    storage = Storage(str(tmp_path))
    originals = {f"clip {at}": clip for at, clip in enumerate(clips)}
    store(storage, originals | {"copy": change(clips[4])})
    made = release(storage, "v1", rules=rules(**NEAR))
    assert made.rows == len(clips)
    assert names(storage, made) >= originals.keys() - {"clip 4"}
    (cluster,) = made.selection["near_duplicates"]["largest"]
    assert {cluster["kept"], *cluster["removed"]} == {sample_id("clip 4"), sample_id("copy")}
    assert cluster["kept"] == min(sample_id("clip 4"), sample_id("copy"))  # as good as each other
    assert "1 near-duplicates removed in 1 clusters" in str(made)


def test_equal_luma_in_other_colours_is_no_duplicate(tmp_path, clips):
    storage = Storage(str(tmp_path))
    grounds = np.zeros((2, 17, 64, 64, 3), np.uint8)
    grounds[:, :, 20:44, 20:44] = np.array([[200, 40, 40], [40, 122, 40]])[:, None, None, None]
    store(storage, {"red": grounds[0], "green": grounds[1]})
    assert release(storage, "v1", rules=rules(near_duplicates={"hash": 12})).rows == 2


def test_the_best_of_a_cluster_stays(tmp_path, clips):
    storage = Storage(str(tmp_path))
    copies = {f"copy {at}": clip for at, clip in enumerate((clips[0], again(clips[0]), brighter(clips[0])))}
    store(storage, copies, score=[0.4, 0.9, 0.7])
    assert names(storage, release(storage, "v1", rules=rules(**NEAR))) == {"copy 1"}
    withdraw(storage, [sample_id("copy 1")], "")
    assert names(storage, release(storage, "v2", rules=rules(**NEAR))) == {"copy 2"}
    by_motion = rules(**NEAR, rank={"motion": 1.0})
    least = min(("copy 0", "copy 2"), key=sample_id)  # motion is the same of all
    assert names(storage, release(storage, "v3", rules=by_motion)) == {least}


def test_a_share_keeps_the_best_by_one_score_or_by_all(tmp_path, clips):
    storage = Storage(str(tmp_path))
    store(storage, {f"clip {at}": clip for at, clip in enumerate(clips[:5])}, score=[0.1, 0.9, 0.5, 0.7, 0.3])
    store(storage, {"not asked": clips[5]}, run="b", scores=[[{"name": "motion", "value": 1.0}]])
    made = release(storage, "v1", rules=rules(keep={"prompt_match": 0.4}))
    assert names(storage, made) == {"clip 1", "clip 3", "not asked"}
    assert made.selection["keep"] == [{"score": "prompt_match", "share": 0.4, "threshold": 0.7, "removed": 3}]
    assert "3 removed below prompt_match 0.7, to keep 0.4" in str(made)
    (page,) = (item["path"] for item in made.files if item["path"].endswith(".html"))
    text = storage.read_bytes(page).decode()
    assert "Of 6 samples that met its condition, 3 are in it." in text
    assert "The best 40% by <code>prompt_match</code>" in text and "3 removed below 0.7." in text
    assert names(storage, release(storage, "v2", rules=rules(keep={"overall": 0.2}))) == {"clip 1", "not asked"}
    with pytest.raises(UserError, match=r"keep.beauty: no sample of this release has this score"):
        release(storage, "v3", rules=rules(keep={"beauty": 0.5}))


def test_a_share_that_the_spec_leaves_to_releases(tmp_path, clips):
    storage = Storage(str(tmp_path))
    store(storage, {f"clip {at}": clip for at, clip in enumerate(clips[:4])}, score=[0.1, 0.9, 0.5, 0.7])
    bars = {"prompt_match": {"keep": 0.5, "first": None}, "overall": {"keep": 0.9, "first": 20}, "motion": 0.1}
    spec = {"judge": {"backend": "transformers", "rubric": "default", "thresholds": bars}}
    row = {"run_id": "r", "event": "started", "spec_json": json.dumps(spec), "created_at": datetime.now(UTC)}
    part = write_part(storage, "runs/r.parquet", pa.Table.from_pylist([row], RUNS))
    Committer(Table(storage, "runs"), "r").commit([part])
    assert names(storage, release(storage, "v1")) == {"clip 1", "clip 3"}
    assert names(storage, release(storage, "v2", rules=rules(keep={"prompt_match": 0.25}))) == {"clip 1"}
    assert release(storage, "v3", rules=rules(keep={})).rows == 4
    made = release(storage, "v4", rules=rules(keep={}, **NEAR))
    assert (made.rows, made.selection["keep"]) == (4, [])


@pytest.mark.parametrize("said", [None, NEAR, {"keep": {"prompt_match": 0.5}}])
def test_samples_without_media_are_said_to_have_none(tmp_path, clips, said):
    storage = Storage(str(tmp_path))
    previews = [[{"role": "preview", "shard": "rejected/0.tar", "mime": "image/webp"}]] * 2
    store(storage, {"a": clips[0], "b": clips[1]}, verdict=["rejected"] * 2, media=previews)
    later = [{"sample_id": sample_id(name), "kind": "verdict", "value": "accepted"} for name in "ab"]
    part = write_part(storage, "annotations/later.parquet", pa.Table.from_pylist(later, ANNOTATIONS))
    Committer(Table(storage, "annotations"), "later").commit([part])
    with pytest.raises(UserError, match=r"where: of the 2 samples that meet .* no media were kept"):
        release(storage, "v1", rules=said and rules(**said))
    assert list(storage.files("releases")) == []


def test_images_are_compared_too(tmp_path, clips):
    storage = Storage(str(tmp_path))
    stills = clips[:6, :1]
    store(storage, {f"still {at}": still for at, still in enumerate(stills)} | {"copy": brighter(stills[2])})
    assert release(storage, "v1", rules=rules(**NEAR)).rows == 6


def test_earlier_releases_are_left_out_with_what_is_near_them(tmp_path, clips):
    storage = Storage(str(tmp_path))
    store(storage, {"first": clips[0], "second": clips[1]})
    v1 = release(storage, "v1", pack_bytes=10**9)
    store(storage, {"first again": again(clips[0]), "third": clips[2]}, "b", score=[1.0, 1.0])
    assert names(storage, release(storage, "both", rules=rules(**NEAR))) == {"first again", "second", "third"}
    made = release(storage, "v2", rules=rules(**NEAR, against=["v1"]))
    assert names(storage, made) == {"third"}
    near = made.selection["near_duplicates"]
    assert (near["removed"], near["of_earlier_releases"], near["in_earlier_releases"]) == (1, 1, 2)
    assert near["largest"] == [
        {"kept": sample_id("first"), "release": "v1", "count": 1, "removed": [sample_id("first again")]}
    ]
    with pytest.raises(UserError, match="nothing is left of it"):
        release(storage, "v3", rules=rules(**NEAR, against="all"))
    with pytest.raises(UserError, match=r"'v9'.*there are: v1, both, v2"):
        release(storage, "v3", rules=rules(**NEAR, against=["v9"]))
    assert names(storage, v1) == {"first", "second"}
    assert [found.kind for found in verify(storage) if found.kind.startswith("release")] == []


def test_signatures_are_computed_once(tmp_path, clips):
    storage = Storage(str(tmp_path))
    store(storage, {f"clip {at}": clip for at, clip in enumerate(clips[:5])})
    seen: list[tuple[int, int]] = []
    first = release(storage, "v1", rules=rules(**NEAR), progress=lambda *at: seen.append(at))
    assert seen[-1] == (5, 5)
    store(storage, {"new": clips[6], "a copy, byte by byte": clips[0]}, "b")
    seen.clear()
    second = release(storage, "v2", rules=rules(**NEAR), progress=lambda *at: seen.append(at))
    assert seen == [(1, 1)]
    shutil.rmtree(Path(storage.path("cache")))
    third = release(storage, "v3", rules=rules(**NEAR))
    assert third.selection == second.selection
    assert names(storage, third) == names(storage, second)
    assert (first.rows, second.rows) == (5, 6)


def test_media_that_cannot_be_read_stay_and_are_counted(tmp_path, clips):
    storage = Storage(str(tmp_path))
    store(storage, {"whole": clips[0], "broken": clips[0], "other": clips[1]})
    shard = "media/20260101t000000-aaaaaa/0.tar"
    store(storage, {"another": clips[0]}, "b")
    data = bytearray(storage.read_bytes(shard))
    data[data.rindex(b"mdat") + 40] ^= 1  # of "other", the last
    storage.write_bytes(shard, bytes(data))
    made = release(storage, "v1", rules=rules(**NEAR))
    assert made.rows == 2
    assert made.selection["not_compared"]["samples"] == 1
    assert "sha256" in made.selection["not_compared"]["why"][0]
    assert "1 could not be compared" in str(made)


@pytest.mark.parametrize("error", [PermissionError, TimeoutError, OSError])
def test_a_fault_of_the_storage_makes_no_release(tmp_path, clips, monkeypatch, error):
    storage = Storage(str(tmp_path))
    store(storage, {"a": clips[0], "b": clips[1]})
    read = storage.fs.cat_file

    def fail(path: str, **span: int | None) -> bytes:
        if "/media/" in path:
            raise error("slow down")
        return read(path, **span)

    with monkeypatch.context() as failing:
        failing.setattr(storage.fs, "cat_file", fail)
        with pytest.raises(error, match="slow down"):
            release(storage, "v1", rules=rules(**NEAR))
        assert list(storage.files("releases")) == []
        # The store refuses a range beyond the end of a shard that was cut: that is the sample's fault.
        storage.write_bytes("media/20260101t000000-aaaaaa/0.tar", b"")
        made = release(storage, "v1", rules=rules(**NEAR))
    assert made.selection["not_compared"]["samples"] == 2
    storage.delete("media/20260101t000000-aaaaaa/0.tar")
    made = release(storage, "v2", rules=rules(**NEAR))
    assert "FileNotFoundError" in made.selection["not_compared"]["why"][0]


def test_caps_keep_the_best_of_each_value(tmp_path, clips):
    storage = Storage(str(tmp_path))
    store(
        storage,
        {f"clip {at}": clip for at, clip in enumerate(clips[:6])},
        score=[0.1, 0.9, 0.5, 0.7, 0.3, 0.2],
        tags=[["a"], ["a"], ["a", "b"], ["b"], None, ["b"]],
        caption=["a Red cat", "a red dog", "a blue cat", "red, red", "nothing", ""],
        captions=[
            [{"style": "short", "text": text}, {"style": "structured", "text": json.dumps({"shape": shape})}]
            for text, shape in zip(
                ["a Red cat", "a red dog", "a blue cat", "red, red", "nothing", ""], "ooxxoo", strict=True
            )
        ],
        extra_json=[json.dumps({"category": kind, "rank": 3}) for kind in "ppqqqq"],
        model=["m"] * 6,
    )

    def kept(number: int, *caps: dict[str, Any]) -> set[int]:
        made = release(storage, f"v{number}", rules=rules(caps=caps))
        return {int(name.removeprefix("clip ")) for name in names(storage, made)}

    assert kept(1, {"by": "tags", "most": 1}) == {1, 3, 4}
    assert kept(2, {"by": "extra.category", "most": 2}) == {0, 1, 2, 3}
    assert kept(3, {"by": "structured.shape", "most": 1}) == {1, 3}
    assert kept(4, {"words": ["red", "CAT"], "most": 1}) == {1, 2, 4, 5}
    assert kept(8, {"words": ["A red"], "most": 1}) == {1, 2, 3, 4, 5}
    assert kept(5, {"by": "floor(score.prompt_match * 2)", "most": 1}) == {1, 4}
    assert kept(6, {"by": "model", "most": 3}, {"by": "tags", "most": 1}) == {1, 3, 4}
    assert kept(7, {"by": "extra.category", "share": 0.5}) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("word", "captions"),
    [
        ("red cat", {"A Red\n cat sits": True, "a red, cat": False, "a red catfish": False, "a cat, red": False}),
        ("x-ray", {"an X-ray of a hand": True, "x ray": False, "max-ray": False}),
        ("cat", {"cat": True, "(cat)": True, "cats": False, "concat": False, "一只cat在": True}),
        ("c++", {"in C++.": True, "in c": False}),
        ("狐狸", {"一只红色的狐狸在雪地里": True, "狐": False}),
        ("แมว", {"เห็นแมวดำ": True, "หมา": False}),
    ],
)
def test_words_of_a_cap_are_found_whole_in_any_language(word, captions):
    assert {caption: bool(_words(caption, _patterns([word]))) for caption in captions} == captions


def test_the_report_shows_clusters_and_caps(tmp_path, clips):
    storage = Storage(str(tmp_path))
    hostile = "<script>alert(1)</script>"
    store(storage, {"a": clips[0], hostile: again(clips[0]), "b": clips[1]}, tags=[["x"], ["x"], [hostile]])
    made = release(storage, "v1", rules=rules(**NEAR, caps=[{"by": "tags", "most": 1}]))
    (path,) = [item["path"] for item in made.files if item["path"].endswith(".html")]
    page = storage.read_bytes(path).decode()
    assert page.count("data:image/webp") == 2
    assert hostile not in page
    assert "&lt;script&gt;" in page
    assert "1 removed in 1 clusters" in page
    assert json.loads(storage.read_bytes("releases/v1/manifest.json"))["selection"]["kept"] == 2


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("nothing", "cap: 'nothing': No field named nothing"),
        ("score.nothing", "no sample has a score 'nothing'"),
        ("1 = 1) FROM samples --", "cap: "),
    ],
)
def test_caps_by_what_there_is_not_are_refused_in_one_line(tmp_path, clips, by, said):
    storage = Storage(str(tmp_path))
    store(storage, {"a": clips[0]})
    with pytest.raises(UserError, match=said) as error:
        release(storage, "v1", rules=rules(caps=[{"by": by, "most": 1}]))
    assert "\n" not in str(error.value)
    assert list(storage.files("releases")) == []


def test_made_as_the_stages_make_it(generated: Callable[..., Any]):
    """Rows, media and runs of a real run: a copy of its rows under other ids are its near-duplicates."""
    storage = generated().storage
    rows = Table(storage, "samples").read().to_pylist()
    copies = [row | {"sample_id": sample_id(row["sample_id"]), "run_id": "20260101t000000-dddddd"} for row in rows]
    committer = Committer(Table(storage, "samples"), "20260101t000000-dddddd")
    part = write_part(storage, "samples/20260101t000000-dddddd-0.parquet", pa.Table.from_pylist(copies, SAMPLES))
    committer.commit([part])
    plainly = release(storage, "v1")
    made = release(storage, "v2", rules=rules(near_duplicates={"hash": 0}))
    assert plainly.rows == 8
    assert made.rows == made.selection["near_duplicates"]["removed"] == 4
    assert [found for found in verify(storage) if found.kind == "release_changed"] == []
