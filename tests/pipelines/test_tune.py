"""`ditmill tune` from the spec to the plan file, and `sampler.plan` from there to a run, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from models.accelerate.registry import canonical
from models.plan import SamplerPlan
from pipelines.plan_file import read_plan
from pipelines.quality import QualityBudget, weighed
from pipelines.resolve import Resolved, resolve_spec
from pipelines.run import open_dataset
from pipelines.spec import absolute_paths, parse_spec
from pipelines.trials import Evaluate, Measured, Prompts, Refused, measure, space
from pipelines.tune import Settings, _prompts, tune

BUDGET = QualityBudget(psnr=25)
PLAIN = {"num_inference_steps": 8, "guidance_scale": 3.0, "max_sequence_length": 16}
Resolve = Callable[..., Resolved]


@pytest.fixture
def resolved(tmp_path: Path) -> Resolve:
    def resolve(replan: bool = False, sampler: dict[str, Any] | None = None, **sections: Any) -> Resolved:
        spec: dict[str, Any] = {
            "prompts": {"inline": [f"{number} cats" for number in range(8)]},
            "buckets": [{"height": 32, "width": 32, "num_frames": 5}],
            "generators": [{"model": "pack://tiny"}],
            "layout": {"batch_size": 2},
            "judge": {"backend": "none"},
            "caption": None,
            "output": {"uri": str(tmp_path / "dataset")},
            "sampler": PLAIN | (sampler or {}),
        }
        return resolve_spec(absolute_paths(parse_spec(spec | sections)), replan=replan)

    return resolve


def by_steps(overfitted: int = 0) -> Callable[[Prompts], Evaluate]:
    """Cost is steps, PSNR 20 and half a dB a step; on the second set of prompts plans of `overfitted` steps lose 10 dB."""
    sets: list[str] = []

    def pool(prompts: Prompts) -> Evaluate:
        sets.append(prompts.digest)
        is_new = len(set(sets)) > 1

        def evaluate(asked: Sequence[tuple[SamplerPlan, int]]) -> list[Measured | Refused]:
            made: list[Measured | Refused] = []
            for plan, at in asked:
                steps, rows = plan.num_inference_steps, len(prompts.batches[at]["prompt"])
                psnr = 20 + steps - (10 if is_new and steps == overfitted else 0)
                made.append(
                    Measured(weighed(np.full(rows, psnr)), np.array([steps / 10]), np.full(rows, 4.0 * steps), steps)
                )
            return made

        return evaluate

    return pool


def tuned(run: Resolved, folder: Path, overfitted: int = 0, **settings: Any) -> Any:
    wanted = Settings(**{"calibration": 4, "held_out": 4, "trials": 30, **settings})
    return tune(run, BUDGET, wanted, folder, lambda line: None, by_steps(overfitted))


def test_measuring_a_plan_says_what_it_costs_and_loses(resolved: Resolve, tmp_path: Path) -> None:
    run = resolved()
    seen, unseen = _prompts(run, BUDGET, Settings(4, 4), tmp_path)
    assert (len(seen), len(unseen), len(seen.batches)) == (4, 4, 2) and seen.digest != unseen.digest
    plain = measure(seen, seen.reference, 1)
    assert plain.scores.tolist() == [[100.0, 1.0]] * 2  # its own clips, bit for bit
    blocks = plain.evaluations[0] / plain.nfe
    assert plain.nfe == 16 and blocks == int(blocks) > 0 and plain.seconds[0] > 0
    few = measure(seen, replace(seen.reference, num_inference_steps=4), 1)
    assert few.nfe == 8 and few.scores[:, 0].max() < 60
    assert np.array_equal(few.scores, measure(seen, replace(seen.reference, num_inference_steps=4), 1).scores)
    reuse = replace(seen.reference, accelerate=canonical([{"technique": "guidance_reuse", "interval": 2, "warmup": 1}]))
    assert measure(seen, reuse, 1).evaluations[0] == 12 * blocks
    found = space(seen)
    assert {"first_block", "magcache", "guidance_interval"} <= set(found.techniques)
    assert len(found.ratios) == 8 and found.shift is not None


def test_accuracy_is_for_prompts_that_the_oracle_reads(resolved: Resolve, tmp_path: Path) -> None:
    seen, _ = _prompts(resolved(), QualityBudget(accuracy=0.01), Settings(2, 2), tmp_path)
    with pytest.raises(UserError, match=r"^--budget: accuracy is read by the oracle .* use judge=0\.01 or psnr=30$"):
        measure(seen, replace(seen.reference, num_inference_steps=1), 0)


def test_the_winner_is_held_to_prompts_that_the_search_did_not_see(resolved: Resolve, tmp_path: Path) -> None:
    found = tuned(resolved(), tmp_path / "plans", overfitted=5)
    # Five steps keep 25 dB where the search looks and 15 elsewhere.
    assert found.plan.sampler["num_inference_steps"] == 6 and found.plan.held_out.samples == 4
    assert len(found.refused) >= 1 and all(why.startswith("5 steps") for why in found.refused)
    assert read_plan(Path(found.files["plan"])) == found.plan
    assert found.plan.reference == {"scheduler": "default", **PLAIN}
    assert len(Path(found.files["table"]).read_text().splitlines()) == found.tried + 1
    assert Path(found.files["plot"]).read_text().startswith("<svg")
    again = tuned(resolved(), tmp_path / "plans", overfitted=5)
    assert again.tried == found.tried and again.plan == found.plan


def test_too_few_prompts_and_no_judge_are_told_in_one_line(resolved: Resolve, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--calibration: expected 8 prompts .* found 8 in prompts; give fewer"):
        tuned(resolved(), tmp_path / "plans", calibration=8)
    with pytest.raises(UserError, match=r"^--budget: judge needs a judge, found judge\.backend: none"):
        _prompts(resolved(), QualityBudget(judge=0.1), Settings(2, 2), tmp_path)


def test_auto_takes_the_plan_beside_the_dataset_once(resolved: Resolve, tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    with pytest.raises(UserError, match=r"^sampler\.plan: .*plans has no plan for pack://tiny .* found none; make one"):
        resolved(sampler={"plan": "auto"})
    file = Path(tuned(resolved(), folder).files["plan"])
    run = resolved(sampler={"plan": "auto"})
    assert run.plan.num_inference_steps == 5 and run.chosen is not None and run.chosen.file == str(file)
    assert run.spec.sampler.plan == "auto" and run.spec.sampler.num_inference_steps == 5
    # By its keys it is the same plan, and so the same samples.
    assert resolved(sampler=read_plan(file).sampler).plan.plan_id == run.plan.plan_id
    assert resolved(sampler={"plan": str(file)}).plan.plan_id == run.plan.plan_id
    assert run.portable_spec.sampler.plan is None and run.portable_spec.sampler.num_inference_steps == 5
    open_dataset(run)
    better = json.loads(file.read_text())
    better["sampler"]["num_inference_steps"] = 3
    (folder / "better.json").write_text(
        json.dumps(better | {"held_out": better["held_out"] | {"cost": {"seconds": 0.01, "evaluations": 1, "nfe": 1}}})
    )
    kept = resolved(sampler={"plan": "auto"})
    assert kept.plan.plan_id == run.plan.plan_id and kept.chosen is not None and kept.chosen.kept
    assert "as the dataset has it" in str(kept.chosen)
    anew = resolved(replan=True, sampler={"plan": "auto"})
    assert anew.plan.num_inference_steps == 3
    open_dataset(anew)
    assert resolved(sampler={"plan": "auto"}).plan.num_inference_steps == 3
    # Another wish is resolved anew without being told to.
    assert resolved(sampler={"plan": str(file)}).plan.num_inference_steps == 5


@pytest.mark.parametrize(
    ("sampler", "sections", "words"),
    [
        (
            {"plan": "auto", "budget": {"psnr": 40}},
            {},
            r"^sampler\.plan: no plan in .* is within sampler\.budget psnr=40",
        ),
        (
            {"plan": "auto", "budget": {"judge": 0.1}},
            {},
            r"^sampler\.plan: no plan in .* is within sampler\.budget judge",
        ),
        ({"plan": "nowhere.json"}, {}, r"^sampler\.plan: .*nowhere\.json has no plan for"),
        ({"plan": "auto"}, {"buckets": [{"height": 64, "width": 32, "num_frames": 5}]}, r"at 64x32x5, found .*32x32x5"),
        ({"plan": "auto"}, {"buckets": [{}, {"height": 32}]}, r"^sampler\.plan: a plan is for one .* found 2 buckets"),
    ],
)
def test_where_no_plan_fits_it_is_told_in_one_line(
    sampler: dict[str, Any], sections: dict[str, Any], words: str, resolved: Resolve, tmp_path: Path
) -> None:
    tuned(resolved(), tmp_path / "plans", trials=12)
    with pytest.raises(UserError, match=words) as error:
        resolved(sampler=sampler, **sections)
    assert "\n" not in str(error.value)


def test_a_plan_that_this_layout_cannot_follow_is_passed_over(resolved: Resolve, tmp_path: Path) -> None:
    file = Path(tuned(resolved(), tmp_path / "plans", trials=12).files["plan"])
    cached = json.loads(file.read_text())
    cached["sampler"]["accelerate"] = [{"technique": "first_block"}]
    cached["held_out"]["cost"]["seconds"] = 0.01
    (file.parent / "cached.json").write_text(json.dumps(cached))
    assert resolved(sampler={"plan": "auto"}).plan.accelerate
    compiled = {"layout": {"batch_size": 2, "compile": True}}
    assert not resolved(sampler={"plan": "auto"}, **compiled).plan.accelerate
    file.unlink()
    with pytest.raises(UserError, match=r"^sampler\.plan: none of 1 plans can be followed here \(sampler\.accelerate"):
        resolved(sampler={"plan": "auto"}, **compiled)


def test_a_spoilt_plan_file_is_told_by_its_name(resolved: Resolve, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"version": 1}')
    with pytest.raises(
        UserError, match=r"^sampler\.plan: .*plan\.json is no plan file \(model: Field required\); make one"
    ):
        resolved(sampler={"plan": str(tmp_path / "plan.json")})
