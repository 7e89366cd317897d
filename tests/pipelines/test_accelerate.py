"""sampler.accelerate: from the spec to the plan's identity, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from pipelines.calibrate import calibrate
from pipelines.resolve import resolve_spec
from pipelines.spec import absolute_paths, parse_spec

SAMPLER = {"num_inference_steps": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
CACHE = {"technique": "first_block", "threshold": 10}


@pytest.fixture
def resolved(tmp_path: Path) -> Callable[..., Any]:
    """The spec of one tiny generator with these techniques, resolved; `sections` are more of it."""

    def resolve(*techniques: dict[str, Any], **sections: Any) -> Any:
        spec = {
            "prompts": {"inline": ["a red cat", "a blue dog"]},
            "buckets": [{"height": 32, "width": 32, "num_frames": 5}],
            "generators": [{"model": "pack://tiny"}],
            "layout": {"batch_size": 2},
            "judge": {"backend": "none"},
            "caption": None,
            "output": {"uri": str(tmp_path / "dataset")},
        }
        sampler = {**SAMPLER, "accelerate": list(techniques), **sections.pop("sampler", {})}
        return resolve_spec(absolute_paths(parse_spec(spec | {"sampler": sampler} | sections)))

    return resolve


def test_techniques_are_part_of_a_plans_identity_and_their_order_and_defaults_are_not(
    resolved: Callable[..., Any],
) -> None:
    interval = {"technique": "guidance_interval", "low": 0.2}
    ids = {
        resolved().plan.plan_id,
        resolved(CACHE).plan.plan_id,
        resolved({**CACHE, "threshold": 0.2}).plan.plan_id,
        resolved(CACHE, interval).plan.plan_id,
    }
    assert len(ids) == 4
    assert resolved(interval, {**CACHE, "warmup": 0}).plan.plan_id == resolved(CACHE, interval).plan.plan_id
    assert json.loads(resolved(CACHE).facts[0].plan_json)["accelerate"] == [
        '{"cooldown":0,"technique":"first_block","threshold":10.0,"warmup":0}'
    ]


def test_what_may_be_kept_is_no_part_of_the_plan(resolved: Callable[..., Any]) -> None:
    run = resolved(CACHE, layout={"batch_size": 2, "max_cache_bytes": 1})
    assert run.plan.plan_id == resolved(CACHE).plan.plan_id
    assert run.generators[0].max_cache_bytes == 1


@pytest.mark.parametrize(
    ("techniques", "sections", "words"),
    [
        (
            [CACHE],
            {"layout": {"parallel": {"ring": 2}}},
            r"^sampler\.accelerate: first_block: not with layout\.parallel",
        ),
        ([CACHE], {"layout": {"compile": True}}, r"^sampler\.accelerate: first_block: not with layout\.compile"),
        (
            [{"technique": "guidance_reuse"}],
            {"sampler": {"guidance_scale": 1}},
            r"^sampler\.accelerate: guidance_reuse: ",
        ),
        ([{"technique": "schedule", "steps": ["all"]}], {}, r"^sampler\.accelerate: schedule\.steps: found 1 for"),
    ],
)
def test_what_does_not_compose_is_refused_before_anything_runs(
    techniques: list[dict[str, Any]], sections: dict[str, Any], words: str, resolved: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=words) as error:
        resolved(*techniques, **sections)
    assert "\n" not in str(error.value)


def test_what_a_plan_costs_is_measured_over_all_of_its_steps(resolved: Callable[..., Any]) -> None:
    """Of a plan cut to its first steps one would not learn that the unconditional branch is left out later on."""
    measured = calibrate(resolved({"technique": "guidance_interval", "low": 0.99}))
    assert measured is not None and measured.nfe == 5 + 1


def test_given_sigmas_are_those_of_the_row(resolved: Callable[..., Any]) -> None:
    run = resolved(sampler={"num_inference_steps": 3, "sigmas": [1.0, 0.7, 0.2], "solver_order": 1})
    assert run.plan.sigmas == (1.0, 0.7, 0.2)
    assert calibrate(run) is not None
    from models.generator import load_generator

    described = load_generator(run.generators[0]).describe(run.plan, 32, 32, 5)
    assert described["plan"]["sigmas"] == [1.0, 0.7, 0.2]
    assert described["scheduler_config"]["solver_order"] == 1
