"""Techniques over ranks, after a teacher's steps, and with a first frame."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from models.accelerate.course import Course, Savings
from models.accelerate.registry import canonical
from models.generator import Generator, GeneratorRef
from models.loading import TeacherRef
from models.noise import noise_key, standard_normal
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan
from tests.models.parallel.ranks import on_ranks

PLAN = SamplerPlan(num_inference_steps=6, guidance_scale=3.0, max_sequence_length=16)
VIDEO = (32, 32, 9)
STEPS, LAYERS = 6, 2


def accelerated(item: dict[str, Any]) -> SamplerPlan:
    return replace(PLAN, accelerate=canonical([item]))


def _latents(ref: GeneratorRef, plan: SamplerPlan) -> tuple[np.ndarray, int, list[dict[str, Any]]]:
    generator, savings = Generator(ref), Savings()
    shape = generator.latent_shape(*VIDEO)
    noise = np.stack([standard_normal(noise_key(0, name, 0), shape) for name in "ab"])
    conditions = generator.encode(["a cat", "two dogs"], ["", "blurred"], [], plan)
    latents, nfe = generator.sample(conditions, noise, plan, *VIDEO, 8.0, savings=savings)
    return latents, nfe, savings.facts


@pytest.mark.parametrize(
    ("item", "degrees"),
    [
        ({"technique": "first_block", "threshold": 1.5}, Degrees(tensor=2)),
        ({"technique": "gated_taylor", "threshold": 0.5, "warmup": 2}, Degrees(cfg=2)),
        ({"technique": "taylorseer", "interval": 2}, Degrees(ulysses=2)),
        ({"technique": "taylorseer", "interval": 2, "keep": "last"}, Degrees(ring=2)),
        ({"technique": "schedule", "steps": ["all", "1.ffn", "all", "*.attn1", "", "all"]}, Degrees(tensor=2)),
        ({"technique": "guidance_rescale"}, Degrees(cfg=2)),
        ({"technique": "guidance_reuse"}, Degrees(ulysses=2)),
    ],
    ids=lambda value: value["technique"] if isinstance(value, dict) else str(value),
)
def test_over_ranks_the_same_is_skipped_and_made(
    item: dict[str, Any], degrees: Degrees, tiny_checkpoint: Callable[[str], str]
) -> None:
    path, plan = tiny_checkpoint("WanPipeline"), accelerated(item)
    wanted, evaluations, saved = _latents(GeneratorRef(path), plan)
    assert item["technique"] == "guidance_rescale" or saved[0]["skipped"] > 0
    for made, counted, facts in on_ranks(degrees.size, _latents, GeneratorRef(path, parallel=degrees), plan):
        assert np.abs(made - wanted).max() <= 1e-4 * np.abs(wanted).max()
        assert counted == evaluations
        assert [each["skipped"] for each in facts] == [each["skipped"] for each in saved]


def _agreed() -> list[bool]:
    wanted = torch.tensor([True, False, True, False]) if dist.get_rank() == 0 else torch.tensor([False] * 4)
    return Course(4, None, group=dist.group.WORLD).agreed(wanted).tolist()


def test_ranks_that_would_decide_differently_do_what_the_first_one_does() -> None:
    assert on_ranks(2, _agreed) == [[True, False, True, False]] * 2


def test_a_teachers_steps_are_computed_whole_and_its_students_are_not(tiny_checkpoint: Callable[[str], str]) -> None:
    path = tiny_checkpoint("WanPipeline")
    plan = replace(accelerated({"technique": "first_block", "threshold": 10.0}), guidance_scale=1.0)
    taught = GeneratorRef(path, teacher=TeacherRef(path, "the-teacher", "ab" * 32, 2, 1.0))
    latents, nfe, facts = _latents(taught, plan)
    assert nfe == STEPS
    asked = STEPS - 2
    assert facts[0]["block_evaluations"] == asked * LAYERS
    assert facts[0]["skipped"] == pytest.approx((asked - 1) * (LAYERS - 1) / (asked * LAYERS))
    plain, _, none = _latents(taught, replace(plan, accelerate=()))
    assert none == []
    assert not np.array_equal(latents, plain)


def test_a_generator_that_denoises_one_by_one_saves_for_each(tiny_checkpoint: Callable[[str], str]) -> None:
    """Image-to-video, whose pipeline names no step to its denoiser."""
    plan = replace(
        PLAN,
        accelerate=canonical(
            [{"technique": "first_block", "threshold": 10.0}, {"technique": "guidance_interval", "high": 0.9}]
        ),
    )
    generator, savings = Generator(GeneratorRef(tiny_checkpoint("WanImageToVideoPipeline"))), Savings()
    shape = generator.latent_shape(*VIDEO)
    noise = np.stack([standard_normal(noise_key(0, name, 0), shape) for name in "ab"])
    frames = [np.full((32, 32, 3), value, np.uint8) for value in (30, 200)]
    conditions = generator.encode(["a cat", "two dogs"], ["", ""], frames, plan)
    latents, nfe = generator.sample(conditions, noise, plan, *VIDEO, 8.0, savings=savings)
    guided = sum(sigma <= 0.9 for sigma in generator.describe(plan, *VIDEO)["sigmas"][:-1])
    assert np.isfinite(latents).all()
    assert nfe == STEPS + guided < 2 * STEPS
    computed = (LAYERS + STEPS - 1) + (LAYERS + guided - 1)
    assert [facts["skipped"] for facts in savings.facts] == pytest.approx(
        [1 - computed / (2 * STEPS * LAYERS)] * 2, abs=1e-6
    )
    assert json.loads(json.dumps(savings.facts)) == savings.facts
