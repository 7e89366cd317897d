from __future__ import annotations

import json
import pickle

import pytest

from models.plan import SamplerPlan


def test_plan_json_is_canonical() -> None:
    text = SamplerPlan(guidance_scale=5, shift=3).to_json()
    assert text == SamplerPlan(guidance_scale=5.0, shift=3.0).to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": "euler"},
        {"num_inference_steps": 21},
        {"guidance_scale": 5.5},
        {"shift": 1.0},
        {"max_sequence_length": 256},
        {"accelerate": ('{"name":"first_block_cache"}',)},
        {"blocks": (8, 4)},
        {"sigmas": (1.0, 0.5)},
        {"solver_order": 3},
    ],
)
def test_plan_id_changes_with_each_field(changes: dict[str, object]) -> None:
    assert SamplerPlan(**changes).plan_id != SamplerPlan().plan_id  # type: ignore[arg-type]


def test_plan_id_survives_pickling() -> None:
    plan = SamplerPlan(num_inference_steps=8)
    assert pickle.loads(pickle.dumps(plan)).plan_id == plan.plan_id == SamplerPlan(num_inference_steps=8).plan_id


def test_a_plan_without_blocks_has_the_identity_it_had_before_there_were_any() -> None:
    assert SamplerPlan().plan_id == "3bf2871d3eb6b41c0736195862523245"


def test_a_plan_comes_back_from_its_json() -> None:
    for plan in (
        SamplerPlan(sigmas=(1.0, 0.5), solver_order=3),
        SamplerPlan(shift=2.0),
        SamplerPlan(blocks=(8, 4), accelerate=("{}",)),
    ):
        assert SamplerPlan.from_dict(json.loads(plan.to_json())) == plan


def test_a_plan_that_is_cut_short_keeps_the_first_of_its_sigmas() -> None:
    assert SamplerPlan(num_inference_steps=8).shortened(3) == SamplerPlan(num_inference_steps=3)
    assert SamplerPlan(num_inference_steps=2).shortened(3) == SamplerPlan(num_inference_steps=2)
    plan = SamplerPlan(num_inference_steps=3, sigmas=(1.0, 0.7, 0.3))
    assert plan.shortened(2) == SamplerPlan(num_inference_steps=2, sigmas=(1.0, 0.7))
