from __future__ import annotations

import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.schema import RUNS
from infra.storage import Storage
from infra.tables import Table
from pipelines.ranking import quality, rank_weights


def test_quality_is_the_weighted_mean_of_what_was_asked():
    scores = [{"name": "motion", "value": 9.0}, {"name": "good", "value": 0.5}, {"name": "better", "value": 0.8}]
    assert quality(scores, {"good": 1.0, "better": 2.0, "absent": 5.0}) == pytest.approx(0.7)
    assert quality(scores, {}) == pytest.approx(0.65)
    assert quality(None, {"good": 1.0}) < quality([{"name": "good", "value": 0.0}], {"good": 1.0})


def test_what_a_screen_accepted_is_ranked_by_its_answers():
    sure = [{"name": "motion", "value": 9.0}, {"name": "screen_prompt_match", "value": 0.99}]
    both = [{"name": "screen_prompt_match", "value": 0.9}, {"name": "prompt_match", "value": 0.51}]
    assert quality(sure, {"prompt_match": 2.0, "no_artefacts": 1.0}) == pytest.approx(0.99)
    assert quality(both, {"prompt_match": 2.0}) == quality(both, {}) == pytest.approx(0.51)


def test_weights_are_those_of_the_newest_runs_rubric(dataset):
    weights = rank_weights(dataset(accepted=2, rejected=0))
    assert weights == {"prompt_match": 2.0, "no_artefacts": 1.0, "motion_smooth": 1.0}
    with pytest.raises(UserError, match="give the weights of scores as `rank`"):
        rank_weights(dataset(accepted=2, rejected=0, spec={"judge": {"rubric": "gone.yaml"}}))
    assert rank_weights(dataset(accepted=2, rejected=0, spec={"judge": {"backend": "none"}})) == {}


def test_facts_of_a_prompt_are_ranked_as_they_are_judged(tmp_path):
    storage = Storage(str(tmp_path))
    spec = {"judge": {"backend": "transformers", "rubric": "default", "decompose": {"threshold": 0.5}}}
    row = {"run_id": "r", "event": "started", "spec_json": json.dumps(spec), "created_at": datetime.now(UTC)}
    part = write_part(storage, "runs/r.parquet", pa.Table.from_pylist([row], RUNS))
    Committer(Table(storage, "runs"), "r").commit([part])
    weights = {"prompt_match": 2.0, "no_artefacts": 1.0, "motion_smooth": 1.0, "decomposed": 1.0}
    assert rank_weights(storage) == weights
