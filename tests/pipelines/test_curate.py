"""Recipe curate from files to rows: what is indexed, judged, kept and told, and that nothing is done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from infra.media import decode
from infra.members import read_member
from infra.tables import Table
from models.pack.planted import FLAWS, Truth, plant
from models.pack.world import render
from pipelines import indexing
from pipelines.differences import difference
from pipelines.funnel import read_funnel, sweep
from pipelines.resolve import Resolved
from pipelines.run import open_dataset
from pipelines.verify import verify
from tests.pipelines.curated import Hands, by_hand, curate, one_group, resolved

COUNT = 40


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "made"
    plant(folder, COUNT)
    return folder


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch)


def _truths(planted: Path) -> list[Truth]:
    return [Truth(**json.loads(line)) for line in (planted / "truth.jsonl").read_text().splitlines()]


def _rows(run: Resolved, table: str) -> list[dict[str, Any]]:
    return Table(run.storage, table).read().to_pylist()


def test_flaws_that_need_no_model_are_found_and_nothing_else_is(planted: Path, tmp_path: Path) -> None:
    run = resolved(tmp_path / "made", [{"path": str(planted / "clips")}])
    curate(run)
    rows = {Path(row["inputs"][0]["uri"]).name: row for row in _rows(run, "samples")}
    truths = _truths(planted)
    seen = {truth.file.split("/")[1]: truth for truth in truths}
    rejected = {seen[name].flaw for name, row in rows.items() if row["verdict"] == "rejected"}
    assert rejected - {"duplicated"} == {"frozen", "flickering", "dark"}
    for name, row in rows.items():
        if seen[name].flaw in ("frozen", "flickering", "dark"):
            assert row["verdict"] == "rejected"
        if seen[name].flaw in ("", "mislabelled", "cut"):
            assert row["verdict"] == "accepted" or any("duplicate of" in why for why in row["reasons"])
    assert len(rows) == len({row["inputs"][0]["sha256"] for row in rows.values()})
    assert list(verify(run.storage)) == []
    found = read_funnel(run.storage)
    assert (found.listed, found.clips) == (COUNT, len(rows))
    assert found.clips - found.kept == sum(step.count for step in found.removed)
    counts = {step.name: step.count for step in found.removed}
    assert counts["flicker > 12"] == counts["brightness < 20"] == 2
    assert found.clip_seconds == pytest.approx(sum(row["num_frames"] / row["fps"] for row in rows.values()))
    at_bound, none, every = sweep(run.storage, "flicker", "most", [12.0, 0.0, 255.0])
    assert (at_bound.kept, none.kept, every.kept) == (found.kept, 0, found.kept + 2)


def test_no_clip_runs_over_a_cut_and_no_other_file_is_cut(planted: Path, tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    run = resolved(tmp_path / "made", [{"path": str(planted / "clips")}], cut={"detector": "adaptive"})
    indexing.commit_clips(run, lambda: one_group(run), indexing.RecordReport())
    spans: dict[str, list[tuple[float, float]]] = {}
    for row in _rows(run, "prompts"):
        (clip,) = row["inputs"]
        spans.setdefault(Path(clip["uri"]).name, []).append((clip["start"], clip["end"]))
    for truth in _truths(planted):
        found = spans.get(truth.file.split("/")[1], [])
        wanted = [(0.0, 2.125)] if truth.cut is None else [(0.0, truth.cut), (truth.cut, 2 * truth.cut)]
        assert sorted(found) == wanted or (truth.flaw == "duplicated" and not found)


def test_a_row_says_where_it_was_cut_and_claims_no_generator(planted: Path, tmp_path: Path) -> None:
    run = resolved(tmp_path / "made", [{"path": str(planted / "clips"), "limit": 1, "licence": "CC0", "tags": ["toy"]}])
    curate(run)
    (row,) = _rows(run, "samples")
    (truth, *_) = _truths(planted)
    assert (row["model"], row["noise_key"], row["num_inference_steps"], row["nfe"]) == ("", "", 0, 0)
    assert (row["inputs"][0]["start"], row["inputs"][0]["end"]) == (0.0, 2.125)
    assert (row["prompt"], row["caption"]) == (truth.caption, truth.caption)
    assert row["tags"] == ["toy"]
    assert json.loads(row["extra_json"])["licence"] == "CC0"
    kept = decode(read_member(run.storage, row["media"][0]), "mp4")
    assert kept.shape == (17, 64, 64, 3)
    assert b"trainedAlgorithmicMedia" not in read_member(run.storage, row["media"][0])
    again = decode((planted / truth.file).read_bytes(), "mp4")
    assert np.abs(kept.astype(int) - again).mean() < 3


def test_a_killed_index_goes_on_where_it_was_and_a_whole_one_lists_nothing(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"path": str(planted / "clips")}]
    Hands.most = 16
    first = resolved(tmp_path / "made", sources)
    open_dataset(first)
    with pytest.raises(KeyboardInterrupt):
        indexing.commit_clips(first, lambda: one_group(first), indexing.RecordReport())
    indexed = len(_rows(first, "sources"))
    assert 0 < indexed < COUNT
    Hands.most, Hands.opened = None, 0
    second = resolved(tmp_path / "made", sources)
    plan = indexing.commit_clips(second, lambda: one_group(second), indexing.RecordReport())
    assert Hands.opened == COUNT - indexed
    monkeypatch.setattr(indexing, "list_items", lambda _: pytest.fail("it was listed again"))
    third = resolved(tmp_path / "made", sources)
    assert indexing.commit_clips(third, lambda: pytest.fail("actors"), indexing.RecordReport()) == plan
    found = difference(third)
    assert (found.unlisted, found.new) == (False, found.planned)
    rows = _rows(third, "prompts")
    assert len(rows) == len({row["prompt_id"] for row in rows}) == found.planned


def test_a_run_after_the_last_sample_takes_new_files_only(planted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    names = [truth.file for truth in _truths(planted) if not truth.flaw]
    for name in names[:3]:
        shutil.copy(planted / name, folder)
    curate(resolved(tmp_path / "made", [{"path": str(folder)}]))
    shutil.copy(planted / names[3], folder)
    again, Hands.opened = resolved(tmp_path / "made", [{"path": str(folder)}]), 0
    assert difference(again).unlisted
    curate(again)
    assert Hands.opened == 1
    assert len(_rows(again, "samples")) == 4
    assert list(verify(again.storage)) == []


def test_a_bad_file_is_a_failure_and_a_file_of_the_same_bytes_is_one_clip(planted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    good = next(truth.file for truth in _truths(planted) if not truth.flaw)
    shutil.copy(planted / good, folder / "a.mp4")
    shutil.copy(planted / good, folder / "b.mp4")
    (folder / "c.mp4").write_bytes(b"")
    (folder / "d.mp4").write_bytes(b"no video at all")
    run = resolved(tmp_path / "made", [{"path": str(folder)}])
    report = indexing.RecordReport()
    indexing.commit_clips(run, lambda: one_group(run), report)
    assert {row["error_type"] for row in _rows(run, "failures")} == {"empty_file", "not_media"}
    assert {row["stage"] for row in _rows(run, "failures")} == {"index"}
    assert (report.read, report.kept, report.identical, report.bad) == (4, 1, 1, 2)
    assert len(_rows(run, "sources")) == 4


def test_all_clips_of_a_source_are_on_one_side_of_the_split(tmp_path: Path, planted: Path) -> None:
    from infra.media import encode

    folder = tmp_path / "clips"
    folder.mkdir()
    scenes = _long_clips()
    for at, frames in enumerate(scenes):
        (folder / f"{at}.mp4").write_bytes(encode(frames, 8, marked=False).data)
    run = resolved(
        tmp_path / "made",
        [{"path": str(folder)}],
        cut={"detector": "none", "shortest": 2, "longest": 4},
        score={"reject_static": False, "reject_duplicates": False},
    )
    curate(run)
    rows = _rows(run, "samples")
    assert len(rows) == 3 * len(scenes)
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["inputs"][0]["uri"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())


def _long_clips() -> list[np.ndarray]:
    from models.pack.grammar import sample_scenes

    rng = np.random.default_rng(3)
    return [np.concatenate(list(render(sample_scenes(rng, 5, kinds=["one"]), range(5)))) for _ in range(3)]


def test_a_source_that_holds_nothing_is_the_user_s_mistake(tmp_path: Path) -> None:
    run = resolved(tmp_path / "made", [{"path": str(tmp_path)}])
    with pytest.raises(UserError, match=r"^sources\.0\.path: .* holds no videos or images; name a place that does$"):
        indexing.commit_clips(run, lambda: one_group(run), indexing.RecordReport())


def test_planted_folder_has_each_flaw_and_the_same_bytes_each_time(planted: Path, tmp_path: Path) -> None:
    again = plant(tmp_path / "again", COUNT)
    assert {truth.flaw for truth in again} == {"", *FLAWS}
    assert again == _truths(planted)
    for truth in again:
        assert (tmp_path / "again" / truth.file).read_bytes() == (planted / truth.file).read_bytes()


def test_columns_of_a_table_do_not_stand_for_what_was_probed(planted: Path, tmp_path: Path) -> None:
    name = next(truth.file for truth in _truths(planted) if not truth.flaw)
    (tmp_path / "clips.csv").write_text(f"url,crop,cut_from,caption\n{planted / name},9,there,a cat\n")
    run = resolved(tmp_path / "made", [{"path": str(tmp_path / "clips.csv")}])
    curate(run)
    (row,) = _rows(run, "samples")
    extra = json.loads(row["extra_json"])
    assert extra["crop"] == "9"
    assert extra["cut_from"]["codec"] == "h264"
    assert (row["verdict"], row["caption"]) == ("accepted", "a cat")
    assert row["media"][0]["codec"] == "h264 as it was, 0.000 to 2.125 s"
