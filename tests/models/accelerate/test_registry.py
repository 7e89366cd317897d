"""The table of techniques: what a plan says of them, its identity, and what is refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from infra.errors import UserError
from models.accelerate.registry import TECHNIQUES, canonical, check, configs, conflict, filled
from models.accelerate.settings import SettingError, described
from models.families import FAMILIES, family_of
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan

Plans = Callable[..., SamplerPlan]
WAN = family_of("WanPipeline")
EXAMPLES: dict[str, dict[str, Any]] = {
    name: {"technique": name} | {"magcache": {"ratios": [1, 0.95]}, "schedule": {"steps": ["all"] * 8}}.get(name, {})
    for name in TECHNIQUES
}


@pytest.mark.parametrize("item", EXAMPLES.values(), ids=EXAMPLES)
def test_a_plan_holds_every_default_and_comes_back(item: dict[str, Any]) -> None:
    (text,) = canonical([item])
    assert (text,) == canonical([json.loads(text)])
    plan = SamplerPlan(accelerate=(text,))
    assert SamplerPlan.from_dict(json.loads(plan.to_json())) == plan
    (config,) = configs(plan)
    assert set(json.loads(text)) == {"technique", *(name for name, *_ in described(type(config)))}


def test_a_default_that_is_written_out_changes_no_identity() -> None:
    assert canonical([{"technique": "first_block"}]) == canonical([{"threshold": 0.1, "technique": "first_block"}])
    assert canonical([{"technique": "guidance_interval", "low": 0}]) == canonical([{"technique": "guidance_interval"}])
    scheduled = [
        {"technique": "schedule", "steps": ["all", parts]} for parts in ("1.ffn 0.attn1", "0.attn1  1.ffn 1.ffn")
    ]
    assert canonical(scheduled[:1]) == canonical(scheduled[1:])


@pytest.mark.parametrize(
    ("item", "key", "message"),
    [
        ({"technique": "first_blok"}, "technique", "did you mean first_block"),
        ({}, "technique", "choose one of: first_block"),
        ({"technique": "first_block", "limit": 1}, "limit", "unknown key; remove it, first_block has threshold"),
        ({"technique": "first_block", "threshold": -1}, "threshold", "expected a number at least 0, found -1"),
        ({"technique": "first_block", "threshold": "0.1"}, "threshold", "found '0.1'"),
        ({"technique": "first_block", "threshold": float("nan")}, "threshold", "found nan"),
        ({"technique": "first_block", "warmup": True}, "warmup", "found True"),
        ({"technique": "taylorseer", "keep": "all"}, "keep", "expected parts or last, found 'all'"),
        ({"technique": "taylorseer", "order": 9}, "order", "at least 0 and at most 4, found 9"),
        ({"technique": "magcache"}, "ratios", "measure them by models.accelerate.magcache.calibrate"),
        ({"technique": "magcache", "ratios": ["1"]}, "ratios", "expected numbers above 0"),
        ({"technique": "schedule"}, "steps", "the first of them all, found none"),
        ({"technique": "schedule", "steps": ["0.ffn"]}, "steps", "the first of them all, found '0.ffn'"),
        ({"technique": "schedule", "steps": ["all", "0.mlp"]}, "steps.1", "found '0.mlp'"),
        ({"technique": "schedule", "steps": ["all", 3]}, "steps.1", "found 3"),
        ({"technique": ["first_block"]}, "technique", "expected a technique, found ['first_block']"),
        ({"technique": "first_block", "threshold": 10**400}, "threshold", "expected a number at least 0"),
        ({"technique": "guidance_interval", "low": 0.5, "high": 0.5}, "low", "expected less than high: 0.5"),
    ],
)
def test_a_mistake_is_told_by_its_key(item: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(SettingError) as error:
        filled(item)
    assert error.value.key == key
    assert message in str(error.value)


def test_two_that_decide_on_blocks_do_not_compose_and_any_other_two_do() -> None:
    for one in EXAMPLES.values():
        for other in EXAMPLES.values():
            both = {TECHNIQUES[item["technique"]].decides for item in (one, other)}
            names = {one["technique"], other["technique"]}
            apart = both == {"blocks"} or one == other or names == {"schedule", "guidance_reuse"}
            assert bool(conflict([one, other])) == apart


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (
        ["first_block"],
        {"degrees": Degrees(ulysses=2)},
        "first_block: not with layout.parallel.ulysses: it looks at whole",
    ),
    (["gated_taylor"], {"degrees": Degrees(ring=2)}, "gated_taylor: not with layout.parallel.ring"),
    (["guidance_reuse"], {"degrees": Degrees(cfg=2)}, "guidance_reuse: not with layout.parallel.cfg: both halves"),
    (["guidance_interval"], {"degrees": Degrees(cfg=2)}, "guidance_interval: not with layout.parallel.cfg"),
    (["guidance_rescale"], {"teacher": True}, "guidance_rescale: with generators.teacher_steps"),
    (["taylorseer"], {"compiled": True}, "taylorseer: not with layout.compile"),
    (["guidance_rescale"], {"offloaded": True}, "guidance_rescale: not with layout.offload"),
    (["taylorseer"], {"blocks": (8, 4)}, "not with sampler.dualparal"),
    (["guidance_reuse"], {"guidance_scale": 1.0}, "guidance_reuse: sampler.guidance_scale is 1"),
    (["first_block"], {"family": "LTXPipeline"}, "first_block: LTX-Video has no such technique"),
    (["first_block"], {"family": "NoPipeline"}, "first_block: a pipeline that runs whole has no such technique"),
    (["first_block", "taylorseer"], {}, "first_block and taylorseer each decide which blocks are computed"),
    (["schedule"], {"num_inference_steps": 9}, "schedule.steps: found 8 for sampler.num_inference_steps: 9"),
    (["schedule"], {"num_inference_steps": 7}, "schedule.steps: found 8 for sampler.num_inference_steps: 7"),
]


@pytest.mark.parametrize(("names", "changes", "message"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_does_not_compose_is_refused_with_the_reason(
    names: list[str], changes: dict[str, Any], message: str, plan_with: Plans
) -> None:
    family = family_of(changes.pop("family", "WanPipeline"))
    layout = {name: changes.pop(name) for name in ("degrees", "teacher", "compiled", "offloaded") if name in changes}
    degrees = layout.pop("degrees", Degrees())
    plan = replace(plan_with(*(EXAMPLES[name] for name in names)), **changes)
    with pytest.raises(UserError) as error:
        check(plan, family, degrees, **layout)
    assert str(error.value).startswith(f"sampler.accelerate: {message}")


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("first_block", Degrees(tensor=2, cfg=2)),
        ("taylorseer", Degrees(ulysses=2, ring=2, cfg=2)),
        ("schedule", Degrees(ulysses=2)),
        ("guidance_interval", Degrees(ulysses=2, tensor=2)),
        ("guidance_rescale", Degrees(cfg=2)),
    ],
)
def test_what_composes_is_let_through(name: str, degrees: Degrees, plan_with: Plans) -> None:
    check(plan_with(EXAMPLES[name]), WAN, degrees)


def test_families_name_only_techniques_that_there_are() -> None:
    assert {name for family in FAMILIES for name in family.accelerators} == set(TECHNIQUES)


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, models.accelerate.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
