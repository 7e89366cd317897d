"""Speed and memory of a randomly initialised Wan of a true size with each technique, against the bare compiled sampler.

Weights are random, so there are no pictures and no quality; what a technique skips by the samples' data says nothing. Such
techniques stand at both ends: `never` is what looking costs, `always` the most that they could save.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from infra.errors import UserError
from models.accelerate.applied import accelerated
from models.accelerate.course import Savings
from models.accelerate.registry import TECHNIQUES, canonical
from models.plan import SamplerPlan
from models.schedulers import build_scheduler
from tests.bench.support.denoisers import CHANNELS, CONFIGS, build_denoiser

TEXT_TOKENS = 512
SHIFT, SCALE = 3.0, 5.0
NEVER, ALWAYS = 0.0, 1e9
"""Thresholds below which nothing, and everything, is skipped."""


@dataclass(frozen=True)
class Case:
    """A plan, and whether the denoiser is compiled under it."""

    name: str
    plan: SamplerPlan
    compiled: bool


@dataclass(frozen=True)
class Cost:
    """Of one sample: wall seconds, the most memory of the device in GiB, the share of block evaluations that was skipped."""

    name: str
    seconds: float
    peak_gib: float
    skipped: float
    steps: int


def bench(options: argparse.Namespace) -> None:
    """Measure every case twice, the second time counts; print a table, or JSON. UserError without a GPU."""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("accelerate: --gpu needs a GPU, found none; to try the script: --device cpu --size small")
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    pipe = pipeline(options.size, options.device, dtype)
    base = pipe.scheduler
    found: list[Cost] = []
    compiled = False
    for case in sorted(cases(options.steps), key=lambda case: not case.compiled):
        if case.compiled and not compiled:
            pipe.transformer.compile()
            compiled = True
        elif not case.compiled and compiled:
            pipe.transformer._compiled_call_impl = None  # torch has no way back that is public
            compiled = False
        try:
            sample(pipe, base, case.plan, options, dtype)  # compiles, and fills the allocator's caches
            found.append(sample(pipe, base, case.plan, options, dtype, case.name))
        except (UserError, torch.OutOfMemoryError) as error:
            print(f"{case.name}: {str(error).splitlines()[0]}", flush=True)
    report(found, options)


def cases(steps: int) -> Iterator[Case]:
    """The bare compiled sampler first. Techniques that decide on blocks are not compiled, as what they compute differs."""
    full = SamplerPlan(scheduler="unipc", num_inference_steps=50, guidance_scale=SCALE)
    usual = replace(full, num_inference_steps=steps)
    yield Case("bare, compiled, 50 steps", full, True)
    yield Case(f"bare, compiled, {steps} steps", usual, True)
    yield Case(f"bare, {steps} steps", usual, False)
    ratios = [1.0] * steps
    items: list[tuple[str, dict[str, Any]]] = [
        ("first_block, never", {"technique": "first_block", "threshold": NEVER}),
        ("first_block, always", {"technique": "first_block", "threshold": ALWAYS}),
        ("gated_taylor, never", {"technique": "gated_taylor", "threshold": NEVER}),
        ("gated_taylor, always", {"technique": "gated_taylor", "threshold": ALWAYS}),
        ("magcache, 3 in a row", {"technique": "magcache", "ratios": ratios, "threshold": 1.0}),
        ("taylorseer 4, last", {"technique": "taylorseer", "keep": "last"}),
        ("taylorseer 4, parts", {"technique": "taylorseer"}),
        (
            "schedule, every other step",
            {"technique": "schedule", "steps": [["all", ""][at % 2] for at in range(steps)]},
        ),
        ("guidance_interval 0.3", {"technique": "guidance_interval", "low": 0.3}),
        ("guidance_reuse 2", {"technique": "guidance_reuse", "interval": 2}),
    ]
    for name, item in items:
        may_compile = TECHNIQUES[item["technique"]].decides == "guidance"
        plan = replace(usual, accelerate=canonical([item]))
        yield Case(f"{steps} steps, {name}{', compiled' if may_compile else ''}", plan, may_compile)


def pipeline(size: str, device: str, dtype: Any) -> Any:
    """A pipeline of the denoiser alone: embeddings go in, latents come out."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    denoiser = build_denoiser(size, device=device, dtype=dtype)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=denoiser)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, base: Any, plan: SamplerPlan, options: argparse.Namespace, dtype: Any, name: str = "") -> Cost:
    """One video of the size asked for, from noise to latents."""
    import torch

    width = CONFIGS[options.size]["text_dim"]
    stream = torch.Generator(options.device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=stream, device=options.device)

    frames = (options.frames - 1) // 4 + 1
    arguments: dict[str, Any] = {
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        "output_type": "latent",
        "prompt_embeds": noise(1, TEXT_TOKENS, width).to(dtype),
        "negative_prompt_embeds": noise(1, TEXT_TOKENS, width).to(dtype),
        "latents": noise(1, CHANNELS, frames, options.height // 8, options.width // 8),
    }
    pipe.scheduler = build_scheduler(base, plan)
    savings = Savings()
    on_gpu = options.device != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.inference_mode(), accelerated(pipe, plan, arguments, 1, savings=savings) as changed:
        pipe(**arguments | changed)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    skipped = savings.facts[0]["skipped"] if savings.facts else 0.0
    return Cost(name, seconds, peak, skipped, plan.num_inference_steps)


def report(found: list[Cost], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([asdict(cost) for cost in found]))
        return
    bare = next((cost for cost in found if cost.name.startswith("bare, compiled, 50")), None)
    short = next((cost for cost in found if cost.name == f"bare, compiled, {options.steps} steps"), None)
    print(
        f"{options.size}, random weights, {options.frames}x{options.height}x{options.width}, one sample, {options.device}"
    )
    print(f"{'':40} {'seconds':>8} {'x 50 steps':>10} {'x bare':>7} {'skipped':>8} {'peak GiB':>9}")
    for cost in found:
        times = ["" if other is None else f"{other.seconds / cost.seconds:.2f}" for other in (bare, short)]
        print(
            f"{cost.name:40} {cost.seconds:8.3f} {times[0]:>10} {times[1]:>7} {cost.skipped:8.1%} {cost.peak_gib:9.2f}"
        )
