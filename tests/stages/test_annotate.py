from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.schema import ANNOTATIONS
from infra.storage import Storage
from stages.annotate import Annotator, WriteAnnotations
from stages.batch import Batch, jsons, texts


@pytest.fixture
def stage(tmp_path) -> WriteAnnotations:
    return WriteAnnotations(Annotator(Storage(str(tmp_path)), "run-a", "judge@1", rubric="r@1+b", asked="r@1"))


def batch_of(**columns: Any) -> Batch:
    return {
        "sample_id": texts(["a", "b", "c"]),
        "error_type": texts(["", "stored_media_missing", ""]),
        "error": texts(["", "is not there", ""]),
        "batch_index": np.full(3, 7),
        **columns,
    }


def written(stage: WriteAnnotations, result: dict[str, Any]) -> list[dict[str, Any]]:
    (part,) = result["parts"]
    data = stage.annotator.storage.read_bytes(part["path"])
    assert (part["table"], part["nbytes"]) == ("annotations", len(data))
    table = pq.read_table(io.BytesIO(data))
    assert table.schema.remove_metadata() == ANNOTATIONS
    assert table.num_rows == part["rows"]
    return table.to_pylist()


def test_verdicts_follow_their_scores_and_come_before_their_reasons(stage):
    value = 0.1 + 0.2  # has no short decimal
    batch = batch_of(
        scores=jsons([[{"name": "match", "value": value}], [], [{"name": "match", "value": 0.5}]]),
        verdict=texts(["rejected", "", "accepted"]),
        reasons=jsons([["match 0.30 < 0.4", "too dark"], [], []]),
    )
    result = json.loads(stage(batch)["result"][0])
    rows = written(stage, result)
    said = [(row["sample_id"], row["kind"], row["name"], row["value"], row["rubric"]) for row in rows]
    assert said == [
        ("a", "score", "match", repr(value), "r@1"),
        ("a", "verdict", "", "rejected", "r@1+b"),
        ("a", "note", "verdict", "match 0.30 < 0.4", "r@1+b"),
        ("a", "note", "verdict", "too dark", "r@1+b"),
        ("c", "score", "match", "0.5", "r@1"),
        ("c", "verdict", "", "accepted", "r@1+b"),
    ]
    assert float(rows[0]["value"]) == value
    assert {(row["annotator"], row["run_id"]) for row in rows} == {("judge@1", "run-a")}
    assert all(row["created_at"] is not None for row in rows)
    counts = {name: result[name] for name in ("batch_index", "accepted", "rejected", "captioned", "failed", "errors")}
    assert counts == {
        "batch_index": 7,
        "accepted": 1,
        "rejected": 1,
        "captioned": 0,
        "failed": 1,
        "errors": ["b: is not there"],
    }


def test_facts_of_a_prompt_are_written_with_their_answers(stage):
    facts = [[{"question": "Is it red?", "needs": [], "p_yes": 0.25}], [], []]
    judged = {"scores": jsons([[]] * 3), "verdict": texts(["accepted"] * 3), "reasons": jsons([[]] * 3)}
    batch = batch_of(**judged, decomposed=texts([json.dumps(facts[0]), "", ""]))
    rows = written(stage, json.loads(stage(batch)["result"][0]))
    notes = [(row["sample_id"], row["name"], row["rubric"]) for row in rows if row["kind"] == "note"]
    assert notes == [("a", "decomposed", "r@1")]
    assert json.loads(next(row["value"] for row in rows if row["kind"] == "note")) == facts[0]


def test_captions_are_written_by_style(stage):
    caption = {"style": "short", "language": "en", "scene": 0, "text": "a cat", "model": "m"}
    result = json.loads(stage(batch_of(captions=jsons([[caption], [], [caption | {"style": "dense"}]])))["result"][0])
    rows = written(stage, result)
    assert [(row["sample_id"], row["kind"], row["name"], row["value"]) for row in rows] == [
        ("a", "caption", "short", "a cat"),
        ("c", "caption", "dense", "a cat"),
    ]
    assert (result["captioned"], result["failed"]) == (2, 1)


def test_captions_of_scenes_have_names_of_their_own_and_an_empty_one_is_said(stage):
    caption = {"style": "short", "language": "en", "scene": 0, "text": "a cat", "model": "m"}
    said = [caption, caption | {"scene": 2, "text": "a dog"}, caption | {"style": "tags", "text": ""}]
    result = json.loads(stage(batch_of(captions=jsons([said, [], []])))["result"][0])
    found = [(row["name"], row["value"]) for row in written(stage, result)]
    assert found == [("short", "a cat"), ("short/2", "a dog"), ("tags", "")]


def test_a_batch_of_failures_writes_no_part(stage):
    batch = batch_of(verdict=texts([""] * 3), scores=jsons([[]] * 3), reasons=jsons([[]] * 3))
    batch["error_type"] = texts(["stored_media_missing"] * 3)
    result = json.loads(stage(batch)["result"][0])
    assert (result["parts"], result["failed"]) == ([], 3)
    assert list(stage.annotator.storage.files()) == []


def test_a_call_that_is_repeated_writes_another_part(stage):
    batch = batch_of(verdict=texts(["accepted"] * 3), scores=jsons([[]] * 3), reasons=jsons([[]] * 3))
    paths = [json.loads(stage(batch)["result"][0])["parts"][0]["path"] for _ in range(2)]
    assert len(set(paths)) == 2
    assert all(path.startswith("annotations/run-a-00000007-") for path in paths)
