"""Guidance with fewer evaluations, or rescaled: against loops written by hand, and in the count of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.accelerate.course import Savings
from models.path import Path
from models.plan import SamplerPlan
from models.schedulers import build_scheduler

STEPS, LAYERS, SAMPLES, SCALE = 8, 5, 4, 3.0
Plans = Callable[..., SamplerPlan]
Plain = Callable[[SamplerPlan], np.ndarray]


def sigmas_of(sampling: Any, plan: SamplerPlan) -> list[float]:
    scheduler = build_scheduler(sampling.generator._schedulers["sample"], plan)
    scheduler.set_timesteps(plan.num_inference_steps)
    return [float(sigma) for sigma in scheduler.sigmas[:-1]]


@pytest.mark.parametrize(
    "item",
    [
        {"technique": "guidance_interval"},
        {"technique": "guidance_reuse", "interval": 1},
        {"technique": "guidance_rescale", "factor": 0},
    ],
    ids=lambda item: item["technique"],
)
def test_what_changes_nothing_is_the_plain_plan_to_the_bit(
    item: dict[str, Any], sampling: Any, plain: Plain, plan_with: Plans
) -> None:
    plan, savings = plan_with(item), Savings()
    latents, nfe = sampling(plan, savings=savings)
    np.testing.assert_array_equal(latents, plain(plan))
    assert nfe == 2 * STEPS
    assert [facts["skipped"] for facts in savings.facts] == [0.0] * SAMPLES


def test_outside_of_the_interval_the_unconditional_branch_is_not_evaluated(sampling: Any, plan_with: Plans) -> None:
    plan, savings = plan_with({"technique": "guidance_interval", "low": 0.5, "high": 0.95}), Savings()
    guided = [0.5 <= sigma <= 0.95 for sigma in sigmas_of(sampling, plan)]
    assert 0 < sum(guided) < STEPS
    with sampling.counting() as seen:
        latents, nfe = sampling(plan, savings=savings)
    assert nfe == STEPS + sum(guided)
    assert sum(seen) == SAMPLES * LAYERS * nfe
    assert savings.facts[0] == {
        "block_evaluations": 2 * STEPS * LAYERS,
        "skipped": pytest.approx(1 - nfe / (2 * STEPS)),
        "cache_bytes": 0,
    }
    expected = by_hand(sampling, plan, lambda step, c, u, before: u() + SCALE * (c - u()) if guided[step] else c)
    np.testing.assert_allclose(latents, expected, atol=1e-5)


def test_a_branch_that_is_asked_at_some_steps_is_computed_there_though_features_are_forecast(
    sampling: Any, plan_with: Plans
) -> None:
    reuse = {"technique": "guidance_reuse", "interval": 4}
    forecast = {"technique": "taylorseer", "interval": 4, "warmup": 3, "cooldown": 0, "keep": "last"}
    with sampling.counting() as seen:
        _, nfe = sampling(plan_with(reuse, forecast))
    assert nfe == STEPS + 2
    # conditional: 0 to 2 and 6; unconditional, asked at 0 and 4: both, though 4 is none of the former
    assert sum(seen) == SAMPLES * LAYERS * (4 + 2)


def test_guidance_alone_leaves_the_list_of_blocks_as_it_is(sampling: Any, plan_with: Plans) -> None:
    """A compiled denoiser is one whose modules stay what they are."""
    found: list[bool] = []
    blocks = sampling.denoiser.blocks
    handle = sampling.denoiser.register_forward_pre_hook(lambda module, _: found.append(module.blocks is blocks))
    try:
        sampling(plan_with({"technique": "guidance_reuse"}))
    finally:
        handle.remove()
    assert all(found)
    assert len(found) == STEPS + STEPS // 2


def test_an_interval_that_holds_no_step_is_the_unguided_plan(sampling: Any, plain: Plain, plan_with: Plans) -> None:
    plan = plan_with({"technique": "guidance_interval", "low": 0.0, "high": 0.01})
    latents, nfe = sampling(plan)
    unguided, _ = sampling(plan_with(guidance_scale=1.0))
    np.testing.assert_array_equal(latents, unguided)
    assert nfe == STEPS


def test_a_difference_is_reused_at_the_steps_between(sampling: Any, plan_with: Plans) -> None:
    plan, savings = plan_with({"technique": "guidance_reuse", "interval": 3, "warmup": 2}), Savings()
    latents, nfe = sampling(plan, savings=savings)
    evaluated = [0, 1, 4, 7]
    assert nfe == STEPS + len(evaluated)

    def guide(step: int, c: torch.Tensor, u: Any, before: dict[str, torch.Tensor]) -> torch.Tensor:
        if step in evaluated:
            before["difference"] = c - u()
        return c + (SCALE - 1) * before["difference"]

    np.testing.assert_allclose(latents, by_hand(sampling, plan, guide), atol=1e-4)
    assert savings.facts[0]["cache_bytes"] == latents[0].nbytes


def test_a_rescaled_prediction_is_as_strong_as_the_conditional_one(sampling: Any, plan_with: Plans) -> None:
    plan = plan_with({"technique": "guidance_rescale", "factor": 0.7})
    latents, nfe = sampling(plan)

    def guide(step: int, c: torch.Tensor, u: Any, before: Any) -> torch.Tensor:
        v = u() + SCALE * (c - u())
        strong = torch.stack([row * (a.std() / row.std()) for row, a in zip(v, c, strict=True)])
        return 0.7 * strong + 0.3 * v

    np.testing.assert_allclose(latents, by_hand(sampling, plan, guide), atol=1e-4)
    assert nfe == 2 * STEPS


def test_a_sample_is_what_it_is_alone(sampling: Any, plan_with: Plans) -> None:
    plan = plan_with("guidance_rescale", "guidance_reuse", {"technique": "guidance_interval", "low": 0.4})
    latents, _ = sampling(plan)
    for row in range(SAMPLES):
        np.testing.assert_allclose(sampling(plan, [row])[0][0], latents[row], atol=2e-4)


def test_all_compose_with_one_another_and_with_a_cache(sampling: Any, plan_with: Plans) -> None:
    """Of the unconditional branch nothing is known where the interval begins: all of its blocks are computed then."""
    interval, cache = {"technique": "guidance_interval", "high": 0.8}, {"technique": "first_block", "threshold": 10.0}
    plan, savings, path = plan_with(cache, interval, "guidance_rescale"), Savings(), Path((STEPS,), STEPS)
    guided = sum(sigma <= 0.8 for sigma in sigmas_of(sampling, plan))
    with sampling.counting() as seen:
        latents, nfe = sampling(plan, savings=savings, states=path)
    assert nfe == STEPS + guided
    computed = (LAYERS + STEPS - 1) + (LAYERS + guided - 1)
    assert sum(seen) == SAMPLES * computed
    assert [facts["skipped"] for facts in savings.facts] == pytest.approx(
        [1 - computed / (2 * STEPS * LAYERS)] * SAMPLES
    )
    np.testing.assert_array_equal(path.states[:, 0], latents)
    turned = plan_with("guidance_rescale", interval, cache)
    assert turned.plan_id == plan.plan_id


def test_plain_plans_before_and_after_are_the_same(sampling: Any, plain: Plain, plan_with: Plans) -> None:
    before = plain(plan_with())
    sampling(plan_with("guidance_rescale", "guidance_reuse"))
    np.testing.assert_array_equal(sampling(plan_with())[0], before)


def by_hand(sampling: Any, plan: SamplerPlan, guide: Any) -> np.ndarray:
    """Latents by a loop over steps, with the prediction that `guide` makes of a step, c, u and what it kept."""
    from models.noise import noise_key, standard_normal
    from tests.models.accelerate.conftest import PROMPTS, VIDEO

    generator, denoiser = sampling.generator, sampling.denoiser
    shape = generator.latent_shape(*VIDEO)
    latents = torch.from_numpy(np.stack([standard_normal(noise_key(0, prompt, 0), shape) for prompt in PROMPTS]))
    conditions = generator.encode(PROMPTS, [""] * SAMPLES, [], plan)
    embeds = {name: torch.from_numpy(value) for name, value in conditions.items()}
    scheduler = build_scheduler(generator._schedulers["sample"], plan)
    scheduler.set_timesteps(plan.num_inference_steps)
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for step, timestep in enumerate(scheduler.timesteps):

            def ask(name: str, given: torch.Tensor = latents, at: torch.Tensor = timestep) -> torch.Tensor:
                made: torch.Tensor = denoiser(
                    hidden_states=given,
                    timestep=at.expand(SAMPLES),
                    encoder_hidden_states=embeds[name],
                    return_dict=False,
                )[0]
                return made

            velocity = guide(step, ask("prompt_embeds"), lambda ask=ask: ask("negative_prompt_embeds"), kept)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.numpy()
