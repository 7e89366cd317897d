from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infra.commit import Committer
from infra.control import live_runs, uncommitted_files
from infra.errors import UserError
from infra.storage import Storage
from infra.tables import Table
from pipelines.annotate import label, recaption, rejudge, restore, withdraw
from pipelines.decisions import count_accepted, read_decisions
from pipelines.verify import verify


def samples(storage: Storage) -> list[dict[str, Any]]:
    return Table(storage, "samples").read().to_pylist()


def annotations(storage: Storage) -> list[dict[str, Any]]:
    return Table(storage, "annotations").read().to_pylist()


def no_cluster() -> Any:
    raise AssertionError("a model would have run")


# ---- labels and withdrawals


@pytest.fixture
def shapes(dataset: Callable[..., Storage]) -> Storage:
    return dataset(accepted=4, rejected=2, failures=1)


def ids(storage: Storage) -> list[str]:
    return [row["sample_id"] for row in samples(storage)]


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace(",", ";").encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("sample_id,label,note", " sample_id , label , note ").encode(),
    ],
    ids=["plain", "BOM", "UTF-16", "semicolons", "CRLF", "spaces"],
)
def test_label_reads_what_spreadsheets_write(shapes, tmp_path, encode):
    first, second, third, *_ = ids(shapes)
    text = f"sample_id,label,note\n{first},y,sharp\n{second},n,'=too dark\n\n{third},y,\n{first},u,\n"
    (tmp_path / "labels.csv").write_bytes(encode(text))
    done = label(shapes, str(tmp_path / "labels.csv"))
    assert (done.samples, done.annotator) == (3, "labels")
    said = read_decisions(shapes)
    assert [said[sample_id].label for sample_id in (first, second, third)] == ["u", "n", "y"]
    notes = {row["sample_id"]: row["value"] for row in annotations(shapes) if row["kind"] == "note"}
    assert notes == {second: "=too dark"}, "the later line has no note"
    assert all(row["created_at"] is not None and row["run_id"] == done.run_id for row in annotations(shapes))


def test_label_of_a_later_file_holds(shapes, tmp_path):
    path, (first, *_) = tmp_path / "labels.csv", ids(shapes)
    for value in ("y", "n", "y"):
        path.write_text(f"sample_id,label\n{first},{value}\n")
        label(shapes, str(path), annotator="ann")
        assert read_decisions(shapes)[first].label == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "sample_id,label\n{known},y\n00000000000000000000000000000bad,n\n",
            "line 3: sample_id: .* has no sample '0+bad'",
        ),
        ("sample_id,label\nnot an id,n\n", "line 2: sample_id: .* has no sample 'not an id'"),
        ("id,label\n{known},y\n", "line 1: expected columns sample_id,label"),
        ("sample_id,verdict\n{known},y\n", "line 1: expected columns sample_id,label"),
        ("sample_id,label\n{known},\n", "line 2: label: expected a label"),
        ('sample_id,label\n{known},"y\n', "is not CSV"),
        ("sample_id,label\n", "holds no labels"),
        ("", "expected columns sample_id,label"),
        ("PAR1\0\0", "is not a CSV"),
    ],
)
def test_label_refuses_a_file_that_is_wrong_and_writes_nothing(shapes, tmp_path, text, said):
    (tmp_path / "labels.csv").write_text(text.format(known=ids(shapes)[0]))
    with pytest.raises(UserError, match=said):
        label(shapes, str(tmp_path / "labels.csv"))
    assert annotations(shapes) == []


def test_label_refuses_a_file_that_cannot_be_read(shapes, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        label(shapes, str(tmp_path / "nothing.csv"))
    (tmp_path / "labels.csv").write_bytes(b"sample_id,label\n\xff\xfe\xfa,y\n")
    with pytest.raises(UserError, match="is not text"):
        label(shapes, str(tmp_path / "labels.csv"))


def test_withdraw_and_restore(shapes):
    first, second, *_ = ids(shapes)
    assert withdraw(shapes, [first, second, first], reason="no").samples == 2
    assert {sample_id for sample_id, one in read_decisions(shapes).items() if one.withdrawn} == {first, second}
    restore(shapes, [first])
    assert {sample_id for sample_id, one in read_decisions(shapes).items() if one.withdrawn} == {second}
    assert "no" in [row["value"] for row in annotations(shapes) if row["kind"] == "note"]
    with pytest.raises(UserError, match="has no sample 'nobody'"):
        withdraw(shapes, [first, "nobody"])


# ---- judging again


def test_rejudge_by_the_same_spec_says_nothing(generated):
    run = generated()
    done = rejudge(run, no_cluster)
    assert (done.samples, done.unchanged) == (0, 6)
    assert annotations(run.storage) == []
    assert Table(run.storage, "runs").read().num_rows == 2, "a run that says nothing leaves no row"


def test_rejudge_by_other_thresholds_decides_from_stored_scores(generated):
    rows = samples(generated().storage)
    scores = {row["sample_id"]: {item["name"]: item["value"] for item in row["scores"]} for row in rows}
    bar = float(np.median([values["prompt_match"] for values in scores.values()]))
    thresholds = {"prompt_match": bar, "no_artefacts": 0.0, "motion_smooth": 0.0}
    run = generated(judge={"thresholds": thresholds})
    done = rejudge(run, no_cluster)
    expected = {at: "accepted" if values["prompt_match"] >= bar else "rejected" for at, values in scores.items()}
    decisions = read_decisions(run.storage)
    now = {row["sample_id"]: row["verdict"] for row in rows} | {
        at: one.verdict for at, one in decisions.items() if one.verdict
    }
    assert now == expected
    assert done.accepted + done.rejected + done.unchanged == 6
    for sample_id, one in decisions.items():
        assert one.decided_by == run.judge_name
        assert one.rubric == run.rubric_id
        assert len(one.reasons) == (one.verdict == "rejected")
        assert all(reason.startswith("prompt_match") for reason in one.reasons), sample_id
    assert rejudge(run, no_cluster).samples == 0, "all is said"
    assert list(verify(run.storage)) == []


def test_rejudge_back_and_forth_follows_the_last_thresholds(generated):
    strict = {"thresholds": {"prompt_match": 1.0, "no_artefacts": 1.0}}
    before = {row["sample_id"]: (row["verdict"], row["reasons"]) for row in samples(generated().storage)}
    for judge, verdicts in ((strict, {"rejected"}), ({}, None), (strict, {"rejected"}), ({}, None)):
        run = generated(judge=judge)
        rejudge(run, no_cluster)
        said = {at: (one.verdict, list(one.reasons)) for at, one in read_decisions(run.storage).items() if one.verdict}
        if verdicts:
            assert {verdict for verdict, _ in said.values()} == verdicts
            assert len(said) == 6
        else:
            assert said == before, "the first thresholds give the first verdicts and reasons again, to the letter"


def test_rejudge_by_other_bounds_of_score_media(generated):
    """Bounds of `score` come before the judge, also when they are changed later."""
    rows = samples(generated().storage)
    motion = {row["sample_id"]: {item["name"]: item["value"] for item in row["scores"]}["motion"] for row in rows}
    bar = float(np.median(list(motion.values())))
    run = generated(score={"min_motion": bar})
    rejudge(run, no_cluster)
    decisions = read_decisions(run.storage)
    slow = {at for at, value in motion.items() if value < bar}
    assert slow == {at for at, one in decisions.items() if one.reasons and one.reasons[0].startswith("motion ")}
    assert all(decisions[at].verdict == "rejected" for at in slow)


def test_rejudge_that_is_cut_short_leaves_nothing_half_said_and_goes_on(generated, monkeypatch):
    run = generated(judge={"thresholds": {"prompt_match": 1.0}})

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(Committer, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rejudge(run, no_cluster)
    assert annotations(run.storage) == []
    assert rejudge(run, no_cluster).rejected == 6
    assert uncommitted_files(run.storage) == []
    assert live_runs(run.storage) == []


def test_rejudge_in_a_scope(generated):
    run = generated(judge={"thresholds": {"prompt_match": 1.0, "motion_smooth": 0.0}})
    accepted = {row["sample_id"] for row in samples(run.storage) if row["verdict"] == "accepted"}
    done = rejudge(run, no_cluster, scope="accepted")
    assert done.rejected == len(accepted)
    assert set(read_decisions(run.storage)) == accepted
    with pytest.raises(UserError, match="scope"):
        rejudge(run, no_cluster, scope="missing")


def test_rejudge_leaves_withdrawn_samples(generated):
    run = generated(judge={"thresholds": {"prompt_match": 1.0}})
    withdraw(run.storage, [ids(run.storage)[0]])
    assert rejudge(run, no_cluster).samples == 5


def test_rejudge_skips_what_is_stored_too_little_of(generated):
    """Another judge, and neither media nor a generator that decodes the latents of what was rejected."""
    run = replace(generated(judge={"num_frames": 2}), facts=())
    done = rejudge(run, no_cluster, scope="rejected")
    assert (done.samples, done.skipped) == (0, 2)
    assert "2 skipped" in str(done)


def test_what_is_accepted_counts_as_decided(generated):
    """A run's target is about samples that a release would hold, not about first verdicts."""
    run = generated(judge={"thresholds": {"prompt_match": 1.0}})
    assert count_accepted(run.storage) == 4
    accepted = [row["sample_id"] for row in samples(run.storage) if row["verdict"] == "accepted"]
    withdraw(run.storage, accepted[:1])
    assert count_accepted(run.storage) == 3
    restore(run.storage, accepted[:1])
    rejudge(run, no_cluster)
    assert count_accepted(run.storage) == 0


def test_rejudge_without_a_judge_is_for_score_media_alone(generated):
    run = generated(judge={"backend": "none"})
    done = rejudge(run, no_cluster)
    assert (done.accepted, done.rejected, done.annotator) == (6, 0, "score")


# ---- with a model, through the graph


@pytest.fixture(scope="module")
def cluster() -> Iterator[Callable[[], Any]]:
    from infra.ray_session import ray_session
    from pipelines.graph import worker_env

    with ray_session(None, worker_env(1)) as found:
        yield lambda: found


def break_media(storage: Storage, row: dict[str, Any], how: str) -> None:
    item = row["media"][0]
    data = bytearray(storage.read_bytes(item["shard"]))
    if how == "changed":
        data[item["offset"] + item["nbytes"] // 2] ^= 1
        storage.write_bytes(item["shard"], bytes(data))
    else:
        storage.write_bytes(item["shard"], bytes(data[: item["offset"] + 10]))


@pytest.mark.ray
def test_rejudge_by_another_judge_looks_at_stored_media_and_resumes(generated, cluster):
    judge = {"num_frames": 2, "screen": {"model": "pack://tiny", "num_frames": 1, "reject": 0.0}}
    run = generated(judge={**judge, "thresholds": {"prompt_match": 0.5, "motion_smooth": 0.0}})
    rows = samples(run.storage)
    kept = sorted(
        (row for row in rows if row["media"]), key=lambda row: (row["media"][0]["shard"], row["media"][0]["offset"])
    )
    whole = {item["shard"]: run.storage.read_bytes(item["shard"]) for row in kept for item in row["media"]}
    break_media(run.storage, kept[0], "changed")
    break_media(run.storage, kept[-1], "missing")
    done = rejudge(run, cluster)
    assert (done.samples, done.failed, done.skipped, done.status) == (4, 2, 0, "done")
    assert any("sha256" in error for error in done.errors)
    said = read_decisions(run.storage)
    assert set(said) == {row["sample_id"] for row in rows} - {kept[0]["sample_id"], kept[-1]["sample_id"]}
    questions = {"prompt_match", "no_artefacts", "motion_smooth"}
    for one in said.values():
        assert set(one.scores) == questions | {f"screen_{name}" for name in questions}
        assert one.rubric == run.rubric_id
    for shard, data in whole.items():
        run.storage.write_bytes(shard, data)
    again = rejudge(run, cluster)
    assert (again.samples, again.unchanged, again.failed) == (2, 4, 0)
    assert len(read_decisions(run.storage)) == 6
    assert (
        max(
            Counter(
                (row["sample_id"], row["kind"], row["name"], row["value"]) for row in annotations(run.storage)
            ).values()
        )
        == 1
    )

    # What this judge has answered decides again without it.
    strict = generated(judge={**judge, "thresholds": {"prompt_match": 1.0}})
    assert rejudge(strict, no_cluster).rejected == 6
    assert live_runs(run.storage) == []
    assert uncommitted_files(run.storage) == []
    assert list(verify(run.storage)) == []
    runs = [row for row in Table(run.storage, "runs").read().to_pylist() if row["run_id"] == done.run_id]
    assert {row["event"] for row in runs} == {"started", "ended"}
    (ended,) = (row for row in runs if row["event"] == "ended")
    assert json.loads(ended["extra_json"])["annotates"] == "judge"
    assert ended["allocated_accelerator_seconds"] > 0


@pytest.mark.ray
def test_rejudge_sees_what_the_generator_made(generated, cluster):
    """Stored latents are decoded to the same frames, so the same judge gives the same scores."""
    run = generated()
    rejected = [row for row in samples(run.storage) if row["verdict"] == "rejected"]
    # The same judge under another name: the label of the spec's model is all that differs.
    other = replace(
        run, spec=run.spec.model_copy(update={"judge": run.spec.judge.model_copy(update={"model": "pack://tiny/"})})
    )
    done = rejudge(other, cluster, scope="rejected")
    assert done.samples == len(rejected) == 2
    said = read_decisions(run.storage)
    for row in rejected:
        first = {item["name"]: item["value"] for item in row["scores"]}
        again = said[row["sample_id"]].scores
        assert again == pytest.approx({name: first[name] for name in again}, abs=1e-4)


@pytest.mark.ray
def test_recaption_captions_what_lacks_a_style(generated, cluster):
    run = generated(caption={"styles": ["short", "dense"]})
    accepted = {row["sample_id"]: row["caption"] for row in samples(run.storage) if row["verdict"] == "accepted"}
    done = recaption(run, cluster, scope="missing")
    assert (done.samples, done.failed) == (4, 0)
    said = read_decisions(run.storage)
    assert set(said) == set(accepted)
    for sample_id, one in said.items():
        assert set(one.captions) == {"short", "dense"}
        assert one.captioned_by["short"][0].startswith("pack://tiny@")
        assert one.captions["short"], sample_id
    assert recaption(run, no_cluster, scope="missing").samples == 0
    assert recaption(run, no_cluster).unchanged == 4


@pytest.mark.ray
def test_a_style_that_could_not_be_had_is_not_asked_for_again(generated, cluster):
    run = generated(caption={"styles": ["short"], "verify": 1.0})
    assert recaption(run, cluster).samples == 4
    assert {tuple(one.captions.items()) for one in read_decisions(run.storage).values()} == {(("short", ""),)}
    assert recaption(run, no_cluster).unchanged == 4
    assert recaption(run, no_cluster, scope="missing").samples == 0


def test_a_sample_without_captions_is_accepted_all_the_same(generate_from):
    root = generate_from(prompts={"inline": ["a red cat"]}, judge={"backend": "none"}, caption={"verify": 1.0})
    rows = Table(Storage(str(root)), "samples").read(["verdict", "caption", "captions"]).to_pylist()
    assert rows == [{"verdict": "accepted", "caption": "", "captions": []}]


def test_recaption_needs_a_captioner(generated):
    run = replace(generated(), captioner=None)
    with pytest.raises(UserError, match="caption"):
        recaption(run, no_cluster)
