"""Techniques that decide which blocks are computed: exact where nothing is skipped, counted, per sample, and gone after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from infra.errors import UserError
from models.accelerate.course import Savings
from models.accelerate.magcache import calibrate
from models.accelerate.registry import decides_by_data
from models.path import Path
from models.plan import SamplerPlan

STEPS, LAYERS, SAMPLES = 8, 5, 4
PLANNED = 2 * STEPS * LAYERS
Plans = Callable[..., SamplerPlan]
Plain = Callable[[SamplerPlan], np.ndarray]

EVERY_OTHER = [*(["all", "1.attn1 *.ffn"] * 3), "", "all"]

SKIP_NOTHING: list[dict[str, Any]] = [
    {"technique": "first_block", "threshold": 0.0},
    {"technique": "gated_taylor", "threshold": 0.0},
    {"technique": "magcache", "ratios": [1.0, 0.9], "threshold": 0.0},
    {"technique": "taylorseer", "interval": 1},
    {"technique": "taylorseer", "interval": 1, "keep": "last"},
    {"technique": "schedule", "steps": ["all"] * STEPS},
    {"technique": "schedule", "steps": ["all", *["*.attn1 *.attn2 *.ffn"] * (STEPS - 1)]},
]
SKIP_MUCH: list[dict[str, Any]] = [
    {"technique": "first_block", "threshold": 10.0},
    {"technique": "gated_taylor", "threshold": 10.0},
    {"technique": "gated_taylor", "threshold": 10.0, "order": 2, "cooldown": 0},
    {"technique": "magcache", "ratios": [1.0, 0.99], "threshold": 1.0},
    {"technique": "taylorseer", "interval": 3},
    {"technique": "taylorseer", "interval": 3, "order": 2, "keep": "last"},
    {"technique": "schedule", "steps": EVERY_OTHER},
]
BY_DATA: list[dict[str, Any]] = [
    {"technique": "first_block", "threshold": 0.25},
    {"technique": "gated_taylor", "threshold": 0.3, "warmup": 2, "cooldown": 0},
]


def named(item: dict[str, Any]) -> str:
    return " ".join(str(value) for value in item.values())[:40]


@pytest.mark.parametrize("item", SKIP_NOTHING, ids=named)
def test_where_nothing_is_skipped_every_bit_is_that_of_the_plain_plan(
    item: dict[str, Any], sampling: Any, plain: Plain, plan_with: Plans
) -> None:
    plan, savings = plan_with(item), Savings()
    with capture_logs() as logs:
        latents, nfe = sampling(plan, savings=savings)
    np.testing.assert_array_equal(latents, plain(plan))
    assert nfe == 2 * STEPS
    assert [(facts["skipped"], facts["block_evaluations"]) for facts in savings.facts] == [(0.0, PLANNED)] * SAMPLES
    assert [line["techniques"] for line in logs] == [[item["technique"]]]


@pytest.mark.parametrize("item", SKIP_MUCH, ids=named)
def test_what_is_skipped_is_not_computed_and_is_counted(
    item: dict[str, Any], sampling: Any, plain: Plain, plan_with: Plans
) -> None:
    plan, savings = plan_with(item), Savings()
    with sampling.counting() as seen:
        latents, nfe = sampling(plan, savings=savings)
    skipped = sum(facts["skipped"] for facts in savings.facts) / SAMPLES
    assert skipped > 0.2
    if (
        item["technique"] == "schedule"
        or item.get("keep", "parts" if item["technique"] == "taylorseer" else "") == "parts"
    ):
        assert sum(seen) == SAMPLES * PLANNED  # a block still mixes what its parts are taken to give
    else:
        assert sum(seen) == pytest.approx(SAMPLES * PLANNED * (1 - skipped))
    assert nfe == 2 * STEPS
    assert np.isfinite(latents).all()
    assert not np.array_equal(latents, plain(plan))
    again, _ = sampling(plan)
    np.testing.assert_array_equal(again, latents)


def test_parts_that_are_skipped_are_not_computed(sampling: Any, plan_with: Plans) -> None:
    plan, savings = plan_with({"technique": "schedule", "steps": EVERY_OTHER}), Savings()
    seen: list[str] = []

    def count(name: str) -> Any:
        return lambda *_: seen.append(name)

    handles = [
        getattr(block, part).register_forward_pre_hook(count(part))
        if part == "ffn"
        else block.attn1.to_q.register_forward_pre_hook(count(part))
        for block in sampling.denoiser.blocks
        for part in ("attn1", "ffn")
    ]
    try:
        with sampling.counting():
            sampling(plan, savings=savings)
    finally:
        for handle in handles:
            handle.remove()
    # attn1: four whole steps of five blocks, three of one, one of none; two branches.
    assert seen.count("attn1") == 2 * (4 * LAYERS + 3)
    parts = 4 * 3 * LAYERS + 3 * (1 + LAYERS)
    assert savings.facts[0]["skipped"] == pytest.approx(1 - parts / (3 * STEPS * LAYERS), abs=1e-6)


@pytest.mark.parametrize("item", SKIP_MUCH, ids=named)
def test_a_plain_plan_after_one_with_a_technique_is_as_before(
    item: dict[str, Any], sampling: Any, plain: Plain, plan_with: Plans
) -> None:
    before = plain(plan_with(item))
    names = [name for name, _ in sampling.denoiser.named_modules()]
    sampling(plan_with(item))
    after, _ = sampling(plan_with())
    np.testing.assert_array_equal(after, before)
    assert [name for name, _ in sampling.denoiser.named_modules()] == names
    assert "forward" not in vars(sampling.denoiser.blocks[0].attn1)
    assert "cache_context" not in vars(sampling.denoiser)


@pytest.mark.parametrize("item", SKIP_MUCH + BY_DATA, ids=named)
def test_a_batch_does_not_know_the_batch_before_it(item: dict[str, Any], sampling: Any, plan_with: Plans) -> None:
    plan = plan_with(item)
    first, _ = sampling(plan, [0, 1])
    sampling(plan, [2, 3])
    again, _ = sampling(plan, [0, 1])
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("item", BY_DATA + SKIP_MUCH, ids=named)
def test_a_sample_is_what_it_is_alone(item: dict[str, Any], sampling: Any, plain: Plain, plan_with: Plans) -> None:
    """To the tolerance that the plain plan has at another batch size; what is skipped is the same to the block."""
    plan, together = plan_with(item), Savings()
    latents, _ = sampling(plan, savings=together)
    apart = []
    for row in range(SAMPLES):
        alone = Savings()
        made, _ = sampling(plan, [row], savings=alone)
        np.testing.assert_allclose(made[0], latents[row], atol=2e-4, rtol=0)
        apart += alone.facts
    assert [facts["skipped"] for facts in apart] == [facts["skipped"] for facts in together.facts]


@pytest.mark.parametrize("item", BY_DATA, ids=named)
def test_samples_of_a_batch_decide_for_themselves(item: dict[str, Any], sampling: Any, plan_with: Plans) -> None:
    savings = Savings()
    with sampling.counting() as seen:
        sampling(plan_with(item), savings=savings)
    shares = [facts["skipped"] for facts in savings.facts]
    assert len(set(shares)) > 1
    assert set(seen) - {SAMPLES}
    assert sum(seen) == pytest.approx(PLANNED * sum(1 - share for share in shares), abs=1e-3)
    assert decides_by_data(plan_with(item))
    assert not decides_by_data(plan_with("taylorseer"))


@pytest.mark.parametrize("item", [SKIP_MUCH[0], SKIP_MUCH[4]], ids=named)
def test_states_of_a_path_are_those_of_the_accelerated_sampler(
    item: dict[str, Any], sampling: Any, plan_with: Plans
) -> None:
    plan, path = plan_with(item), Path((0, 4, STEPS), STEPS)
    latents, _ = sampling(plan)
    with_path, _ = sampling(plan, states=path)
    np.testing.assert_array_equal(with_path, latents)
    np.testing.assert_array_equal(path.states[:, -1], latents)


def test_warm_up_and_cool_down_are_computed(sampling: Any, plan_with: Plans) -> None:
    savings = Savings()
    item = {"technique": "first_block", "threshold": 10.0, "warmup": 3, "cooldown": 2}
    sampling(plan_with(item), savings=savings)
    skipped = 3 * 2 * (LAYERS - 1) / PLANNED
    assert [facts["skipped"] for facts in savings.facts] == pytest.approx([skipped] * SAMPLES, abs=1e-6)


def test_what_is_kept_is_reported_and_bounded(sampling: Any, plan_with: Plans) -> None:
    """TaylorSeer keeps (order + 1) features of each part, for each branch; the last block alone is far less."""
    channels, tokens = 128, 3 * 4 * 4
    kept = {}
    for keep in ("parts", "last"):
        savings = Savings()
        sampling(plan_with({"technique": "taylorseer", "interval": 3, "keep": keep}), savings=savings)
        kept[keep] = savings.facts[0]["cache_bytes"]
    feature = channels * tokens * 4
    assert kept == {"parts": 2 * 2 * 3 * LAYERS * feature, "last": 2 * 2 * feature}
    ref = sampling.generator.ref
    sampling.generator.ref = replace(ref, max_cache_bytes=SAMPLES * kept["last"])
    try:
        sampling(plan_with({"technique": "taylorseer", "interval": 3, "keep": "last"}))
        with pytest.raises(UserError, match=r"^layout\.max_cache_bytes: taylorseer want"):
            sampling(plan_with({"technique": "taylorseer", "interval": 3, "keep": "parts"}))
    finally:
        sampling.generator.ref = ref


def test_ratios_are_measured_on_the_checkpoint(sampling: Any, plain: Plain, plan_with: Plans) -> None:
    """One a step, and such that MagCache with them skips: of a random model the residual hardly changes."""
    ratios = calibrate(sampling.denoiser, lambda: sampling(plan_with()))
    assert len(ratios) == STEPS
    assert ratios[0] == 1
    assert all(0.5 < ratio < 2 for ratio in ratios)
    savings = Savings()
    item = {"technique": "magcache", "ratios": list(ratios), "threshold": 10.0, "max_skips": 2, "warmup": 2}
    latents, _ = sampling(plan_with(item), savings=savings)
    # Steps 2, 3 and 5, 6 are skipped, in both branches.
    assert savings.facts[0]["skipped"] == pytest.approx(4 / STEPS)
    assert np.abs(latents - plain(plan_with())).max() < 1
    with pytest.raises(RuntimeError, match="was not asked twice"):
        calibrate(sampling.denoiser, lambda: None)


def test_a_denoiser_that_is_not_what_a_technique_expects_is_an_error(sampling: Any, plan_with: Plans) -> None:
    denoiser = sampling.denoiser
    blocks = denoiser.blocks
    denoiser.blocks = blocks[:1]
    try:
        with pytest.raises(RuntimeError, match="has no list of blocks named `blocks`"):
            sampling(plan_with("first_block"))
    finally:
        denoiser.blocks = blocks
    with pytest.raises(UserError, match="names block 7, and this denoiser has blocks 0 to 4"):
        sampling(plan_with({"technique": "schedule", "steps": ["all", *["7.ffn"] * 7]}))
