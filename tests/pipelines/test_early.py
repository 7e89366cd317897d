"""sampler.early_reject from the spec to the tables: what it may lose, what it stops, and how that is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra.commit import Committer, write_part
from infra.errors import UserError
from infra.schema import SAMPLES
from infra.storage import Storage
from infra.tables import Table
from pipelines.answers import Answers
from pipelines.calibrate import calibrate
from pipelines.commits import Commits, Retry, failures
from pipelines.differences import difference
from pipelines.early import EarlyGate, Measured, early_told, find, measured
from pipelines.enumeration import Batches, Enumeration
from pipelines.operating_point import at_most, by_loss, least_for
from pipelines.ranking import quality
from pipelines.recipes import RECIPES
from pipelines.regenerate import regenerate
from pipelines.report import funnel_steps
from pipelines.report_data import Snapshot, read_facts
from pipelines.resolve import Resolved
from pipelines.run import expand
from pipelines.spec import parse_spec
from pipelines.verify import verify
from stages.actor import run_stage
from stages.batch import STOPPED, Batch, size
from stages.early import BELOW, is_held_out

EARLY = {"call": "early_score:score", "version": "1", "loss": 0.5, "at": 0.99, "hold_out": 0.02}


# ---- what may be lost


def test_as_many_good_samples_are_asked_for_as_a_bound_of_no_loss_needs() -> None:
    assert least_for(0.01) == 299
    for loss in (0.005, 0.01, 0.05, 0.3):
        least = least_for(loss)
        assert at_most(0, least) <= loss < at_most(0, least - 1)
        assert by_loss(np.linspace(0, 1, least), loss) == (0.0, 0)
        assert by_loss(np.linspace(0, 1, least - 1), loss) is None


@pytest.mark.parametrize(("count", "loss"), [(299, 0.01), (700, 0.01), (100, 0.05), (90, 0.1)])
@pytest.mark.parametrize("shape", [0.3, 1.0, 4.0])
def test_in_at_least_95_of_100_datasets_no_more_is_lost(count: int, loss: float, shape: float) -> None:
    """Scores u^shape of good samples: below t there are t^(1 / shape) of them."""
    rng = np.random.default_rng(count)
    draws = 2000
    lost = []
    for _ in range(draws):
        found = by_loss(rng.uniform(size=count) ** shape, loss)
        assert found is not None
        lost.append(found[0] ** (1 / shape))
    held = float(np.mean(np.array(lost) <= loss))
    assert held >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / draws)
    assert np.mean(lost) > loss / 5, "a bound that nothing comes near saves nothing"


def test_equal_scores_are_lost_together_or_not_at_all() -> None:
    threshold, lost = by_loss(np.array([0.0] + [0.5] * 999), 0.05)  # type: ignore[misc]
    assert (threshold, lost) == (0.5, 1)


def test_what_was_held_out_tells_what_was_lost() -> None:
    found = Measured(stopped=490, held_out=10, good=1, accepted=451)
    assert found.lost == pytest.approx((49 / 500, 490 * at_most(1, 10) / (451 + 490 * at_most(1, 10))))
    assert Measured(5, 0, 0, 9).lost is None


def test_a_fixed_share_is_held_out_by_its_id() -> None:
    held = [is_held_out(f"{at:032x}", 0.02) for at in range(20_000)]
    assert np.mean(held) == pytest.approx(0.02, abs=0.003)
    assert held == [is_held_out(f"{at:032x}", 0.02) for at in range(20_000)]


# ---- from the spec


@pytest.fixture(autouse=True)
def early_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score of one's own: a prompt with a cat is worth 1, any other 0."""
    (tmp_path / "early_score.py").write_text(
        "import numpy as np\n\n\ndef score(batch):\n"
        "    return {'cats': np.array([float('cat' in prompt) for prompt in batch['prompt']])}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_no_identity_depends_on_it(generated: Callable[..., Resolved]) -> None:
    plain, early = generated(), generated(sampler={"early_reject": EARLY})
    assert early.plan.plan_id == plain.plan.plan_id and early.generator_ids == plain.generator_ids
    assert (early.judge_name, early.rubric_id) == (plain.judge_name, plain.rubric_id)
    other = generated(sampler={"early_reject": {**EARLY, "at": 0.9}})
    assert early.early is not None and other.early is not None and early.early.asked != other.early.asked
    assert difference(early).new == 0


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"layout": {"parallel": {"ulysses": 2}}}, "sampler.early_reject: not with layout.parallel, for each rank"),
        ({"sampler": {"early_reject": {}}, "judge": {"backend": "oracle"}}, "found judge.backend: oracle; give"),
        ({"sampler": {"early_reject": {"questions": ["beauty"]}}}, "has no question beauty; it has prompt_match"),
        (
            {"sampler": {"early_reject": {"calibration": 100}}},
            "expected at least 299, which loss: 0.01 needs, found 100",
        ),
        ({"sampler": {"early_reject": {"call": "a:b"}}}, "call needs a version"),
        ({"sampler": {"early_reject": {**EARLY, "questions": ["prompt_match"]}}}, "call is code of your own"),
    ],
)
def test_what_cannot_be_is_one_line(sections: dict[str, Any], said: str, generated: Callable[..., Resolved]) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{said}[^\n]*$"):
        generated(**{"sampler": {"early_reject": EARLY}, **sections})


def test_the_screen_is_asked_before_the_judge(generated: Callable[..., Resolved]) -> None:
    screen = {"model": "pack://tiny", "num_frames": 2, "questions": ["prompt_match"]}
    run = generated(sampler={"early_reject": {}}, judge={"model": "pack://tiny", "screen": screen})
    assert run.early is not None and run.early.num_frames == 2
    assert [question.name for question in run.early.rubric.questions] == ["prompt_match"]
    alone = generated(sampler={"early_reject": {"questions": ["no_artefacts"]}})
    assert alone.early is not None and [each.name for each in alone.early.rubric.questions] == ["no_artefacts"]


def test_the_early_score_is_none_of_the_judges_answers(generated: Callable[..., Resolved]) -> None:
    run = generated(sampler={"early_reject": EARLY})
    (row, *_) = Table(run.storage, "samples").read().to_pylist()
    answered = Answers(run).of(row)
    looked_at = row | {"scores": [{"name": "early", "value": 0.5}, *row["scores"]]}
    assert answered and Answers(run).of(looked_at) == answered
    assert quality(looked_at["scores"], {}) == quality(row["scores"], {})


# ---- the threshold of a dataset


def add_samples(run: Resolved, scores: list[float], good: Callable[[float], bool], start: int, **facts: Any) -> None:
    """One commit of samples that were looked at, each accepted or not."""
    assert run.early is not None
    (row, *_) = Table(run.storage, "samples").read().to_pylist()
    said = json.dumps({"early": {"asked": run.early.asked, "step": 1, **facts}})
    rows = [
        row
        | {"sample_id": f"{at:032x}", "scores": [{"name": "early", "value": score}], "extra_json": said}
        | {"judge": run.judge_name, "rubric": run.rubric_id, "verdict": "accepted" if good(score) else "rejected"}
        for at, score in enumerate(scores, start)
    ]
    part = write_part(run.storage, f"samples/added-{start}.parquet", pa.Table.from_pylist(rows, SAMPLES))
    Committer(Table(run.storage, "samples"), run.run_id).commit([part])


def test_a_threshold_is_found_on_the_first_samples_and_stays(generated: Callable[..., Resolved]) -> None:
    run = generated(sampler={"early_reject": {**EARLY, "loss": 0.1}})  # 29 good ones
    assert find(run) is None
    assert early_told(run) == [
        "sampler.early_reject: nothing is stopped until 29 accepted samples have an early score; 0 have"
    ]
    gate = EarlyGate(run)
    batches: Iterator[Batch] = iter([{"attempt": np.array([1, 2, 1])}] * 2)
    bounded = gate.bounded(batches)
    assert next(bounded)[BELOW].tolist() == [-math.inf] * 3
    add_samples(run, [at / 100 for at in range(60)], lambda score: score >= 0.2, 0)
    gate._looked = -math.inf
    assert next(bounded)[BELOW].tolist() == [0.2, -math.inf, 0.2], "what is tried again is not stopped"
    point = find(run)
    assert point is not None and (point.threshold, point.good, point.samples, point.lost) == (0.2, 29, 49, 0)
    add_samples(run, [0.001] * 99, lambda score: True, 1000, below=0.2)
    add_samples(run, [0.001] * 99, lambda score: True, 2000)
    assert find(run) == point, "what came later changes nothing"
    assert find(generated(sampler={"early_reject": {**EARLY, "loss": 0.1, "at": 0.9}})) is None, "another look"
    bars = {"prompt_match": 0.9}
    assert find(generated(sampler={"early_reject": {**EARLY, "loss": 0.1}}, judge={"thresholds": bars})) is None


# ---- through the stages to the tables


def go(run: Resolved, below: float, retry: tuple[Retry, ...] = ()) -> list[dict[str, Any]]:
    """Make what is left of a run's samples, as a run does, in this process. What each batch came to."""
    enumeration, _ = expand(run, lambda: ())
    assert isinstance(enumeration, Enumeration)
    done = {row["sample_id"] for row in Table(run.storage, "samples").read(["sample_id"]).to_pylist()}
    failed, attempts = failures(run.storage, None, retry)

    def is_done(ids: list[str]) -> np.ndarray:
        return np.array([each in done for each in ids]) | failed.contains(ids)

    commits, results = Commits(run.storage, run.run_id, 0.0), []
    recipe = RECIPES[run.spec.recipe]
    for batch in Batches(enumeration, is_done, run.spec.layout.batch_size, attempts, run.spec.seed):
        batch[BELOW] = np.where(batch["attempt"] > 1, -math.inf, np.full(size(batch), below))
        for stage in (*recipe.generating(run), *recipe.judging(run)):
            stage.load()
            batch, _ = run_stage(stage, batch)
        results.append(json.loads(batch["result"][0]))
        commits.add(results[-1]["parts"])
        commits.commit(force=True)
    return results


def spec_of(root: Path, **sections: Any) -> Resolved:
    from pipelines.resolve import resolve_spec
    from pipelines.run import open_dataset

    things = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog")]
    run = resolve_spec(
        parse_spec(
            {
                "prompts": {"inline": things},
                "buckets": [{"height": 32, "width": 32, "num_frames": 5}],
                "generators": [{"model": "pack://tiny"}],
                "sampler": {"num_inference_steps": 3, "early_reject": EARLY},
                "layout": {"batch_size": 4},
                "judge": {"backend": "none"},
                "score": {"reject_duplicates": False},
                "caption": None,
                "output": {"uri": str(root), "tensors": {"latents": "float32"}},
                **sections,
            }
        )
    )
    open_dataset(run)
    return run


def test_a_stopped_sample_is_a_failure_that_counts_as_rejected_until_it_is_finished(tmp_path: Path) -> None:
    run = spec_of(tmp_path / "dataset")
    (result,) = go(run, below=0.5)
    assert (result["accepted"], result["rejected"], result["failed"]) == (2, 2, 0)
    stopped = Table(run.storage, "failures").read().to_pylist()
    assert [row["error_type"] for row in stopped] == [STOPPED] * 2
    assert {row["error"] for row in stopped} == {"step 2: score 0 < 0.5"}
    assert {row["stage"] for row in stopped} == {"sample"} and all("dog" in row["prompt"] for row in stopped)
    made = Table(run.storage, "samples").read().to_pylist()
    assert all({"name": "early", "value": 1.0} in row["scores"] for row in made)
    said = json.loads(made[0]["extra_json"])["early"]
    assert said == {"asked": run.early.asked, "batch": 2, "below": 0.5, "step": 2}  # type: ignore[union-attr]
    assert {row["nfe"] for row in made} == {6}
    facts = read_facts(Snapshot(run.storage), {})
    assert (facts.planned, facts.generated, facts.stopped, facts.failed) == (4, 2, 2, 0)
    assert ("stopped early", 2, "rejected") in [(step.name, step.count, step.kind) for step in funnel_steps(facts)]
    assert list(verify(run.storage)) == []
    assert regenerate(Storage(run.storage.root), made[0]["sample_id"]).promise == "to float tolerance"
    with pytest.raises(UserError, match="--retry-early` finishes it"):
        regenerate(Storage(run.storage.root), stopped[0]["sample_id"])

    found = difference(run)
    assert (found.new, found.failed, found.stopped) == (0, 0, 2)
    assert "2 planned samples were stopped early: --retry-early finishes them" in found.lines("here")
    assert go(run, below=0.5) == go(run, below=0.5, retry=("failed",)) == [], "they are done, and did not fail"
    (again,) = go(run, below=0.5, retry=("early",))
    assert (again["accepted"], again["rejected"]) == (2, 0)
    finished = Table(run.storage, "samples").read().to_pylist()
    assert len(finished) == 4
    assert (measured(run).stopped, difference(run).stopped) == (2, 0)
    assert list(verify(run.storage)) == []


def test_what_is_held_out_goes_on_and_says_so(tmp_path: Path) -> None:
    run = spec_of(
        tmp_path / "dataset", sampler={"num_inference_steps": 3, "early_reject": {**EARLY, "hold_out": 0.999999}}
    )
    (result,) = go(run, below=0.5)
    assert (result["accepted"], result["rejected"]) == (4, 0)
    facts = [json.loads(row["extra_json"])["early"] for row in Table(run.storage, "samples").read().to_pylist()]
    assert sorted(each.get("held_out", False) for each in facts) == [False, False, True, True]
    assert not any("batch" in each for each in facts), "the batch went on whole, and so to the bit"
    assert measured(run) == Measured(stopped=0, held_out=2, good=2, accepted=4)


def test_a_trajectory_recipe_keeps_states_of_what_is_finished(tmp_path: Path) -> None:
    run = spec_of(tmp_path / "dataset", recipe="trajectory", trajectory={"keep": [0, -1]})
    (result,) = go(run, below=0.5)
    assert (result["accepted"], result["rejected"], result["failed"]) == (2, 2, 0)
    assert list(verify(run.storage)) == []


def test_a_plan_says_what_a_look_costs_and_when_it_pays(tmp_path: Path) -> None:
    found = calibrate(spec_of(tmp_path / "dataset"))
    assert found is not None and found.look is not None
    look = found.look
    assert (look.step, look.steps, look.nbytes) == (2, 3, 0)
    assert 0 < look.seconds < found.stage_seconds["sample"] / found.samples
    seconds = {name: taken / found.samples for name, taken in found.stage_seconds.items()}
    assert look.rest == pytest.approx((seconds["sample"] - look.seconds) / 3 + seconds["decode"] + seconds["score"])
    assert f"pays where more than {look.seconds / look.rest:.0%} of the samples are stopped" in str(look)
    assert calibrate(spec_of(tmp_path / "plain", sampler={"num_inference_steps": 3})).look is None  # type: ignore[union-attr]
