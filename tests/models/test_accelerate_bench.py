"""`ditmill bench accelerate`: its plans and figures on numbers whose truth is known, and its GPU script on a CPU."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from models.accelerate.registry import check
from models.families import family_of
from models.loading import GeneratorRef
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan
from tests.bench.support import gpu_sampler
from tests.bench.support.accelerated import FULL, TUNED, USUAL, Sampled, arms_of, figures, psnr, rows, table


def arm(name: str, cost: float, wrong: int, kind: str = "") -> Sampled:
    made = Sampled(name, GeneratorRef(""), SamplerPlan(), kind=kind)
    made.right = [{"shape": True, "colour": at >= wrong} for at in range(100)]
    made.seconds, made.nfe = {"sample": [9.0, cost, cost]}, {10}
    made.psnr, made.evaluations = [30.0] * 100, [60.0] * 100
    return made


def test_plans_of_the_bench_can_be_followed_and_differ() -> None:
    arms = arms_of(GeneratorRef(""), 1.75, 20, 8, {"mine": SamplerPlan(num_inference_steps=7)}, (1.0,) * 20)
    assert [each.name for each in arms[:2]] == [FULL, USUAL] and arms[0].plan.num_inference_steps == 50
    assert len({each.plan.plan_id for each in arms}) == len({each.name for each in arms}) == len(arms)
    for each in arms:
        check(each.plan, family_of("WanPipeline"), Degrees())
    kinds = [each.kind for each in arms]
    assert all(kinds.count(kind) >= 2 for kind in set(kinds))


def test_the_best_plan_is_the_cheapest_that_keeps_its_accuracy() -> None:
    arms = [arm(FULL, 1.5, 4), arm(USUAL, 0.5, 4), arm("8 steps", 0.24, 5, "fewer"), arm("4 steps", 0.1, 30, "fewer")]
    arms.append(arm("both", 0.2, 6, TUNED))
    found = {figure.name: figure for figure in figures(arms)}
    assert found[f"times less than {FULL}"].value == pytest.approx(7.5)
    assert found[f"times less than {USUAL}"].met
    alone = found["times less than 8 steps, alone"]
    assert alone.part == "both" and alone.value == pytest.approx(1.2) and alone.met
    assert [row["apart"] for row in rows(arms)] == pytest.approx([0, 0, -0.5, -13, -1])
    assert len(table(arms).splitlines()) == 2 + len(arms)


def test_psnr_of_clips_that_differ_by_one_level_everywhere() -> None:
    clips = np.full((2, 3, 4, 4, 3), 100, np.uint8)
    assert psnr(clips, clips).tolist() == [100.0, 100.0]
    assert psnr(clips, clips + 1) == pytest.approx(20 * np.log10(255), abs=1e-4)


def test_the_gpu_script_samples_by_every_technique_on_a_small_denoiser() -> None:
    options = argparse.Namespace(size="small", device="cpu", frames=5, height=32, width=32, steps=4)
    pipe = gpu_sampler.pipeline("small", "cpu", torch.float32)
    found = {}
    for case in gpu_sampler.cases(options.steps):
        if case.plan.num_inference_steps == options.steps:
            cost = gpu_sampler.sample(pipe, pipe.scheduler, case.plan, options, torch.float32, case.name)
            found[case.name.removeprefix("4 steps, ")] = cost.skipped
    assert found["first_block, never"] == found["bare, 4 steps"] == 0
    # Of eight blocks the first is always computed, and all of them at the first step.
    assert found["first_block, always"] == pytest.approx(3 / 4 * 7 / 8)
    assert found["schedule, every other step"] == found["guidance_reuse 2, compiled"] * 2 == 0.5
