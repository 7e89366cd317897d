"""What each parallel layout costs and gains: seconds, CPU-seconds and bytes a rank, beside one process and the ideal.

    ditmill bench parallel [--size small] [--frames 33] [--side 16] [--steps 2] [--repeat 3]
    python -m tests.bench.parallel --device cuda --size wan-1.3b    # without Ray; one GPU: one process only

A step is one evaluation of either branch of guidance. Each rank computes with one thread. `efficiency` is T(1) / (P T(P)),
the best of the repeats on both sides; `work` is the same of CPU-seconds, the busiest rank's, which other users of the machine
and a lack of cores disturb less. Layouts of more ranks than there are cores have no efficiency that means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from models.parallel.degrees import Degrees
from models.parallel.layout import lay_out
from tests.bench.support.denoisers import CONFIGS, build_denoiser, build_inputs
from tests.bench.support.traffic import Traffic
from tests.models.parallel.ranks import on_ranks

LAYOUTS = {
    "cfg 2": Degrees(cfg=2),
    "ulysses 2": Degrees(ulysses=2),
    "ring 2": Degrees(ring=2),
    "tensor 2": Degrees(tensor=2),
    "ulysses 4": Degrees(ulysses=4),
    "ring 4": Degrees(ring=4),
    "ulysses 2 x ring 2": Degrees(ulysses=2, ring=2),
    "cfg 2 x ulysses 2": Degrees(cfg=2, ulysses=2),
}
TARGETS = {"ulysses 2": 0.8}
WARM_UP = 1


class _Pipeline:
    """What `lay_out` takes: something that has a denoiser."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


def main() -> None:
    options = _arguments()
    if options.device != "cpu":
        print(json.dumps(alone_on(options)) if options.json else _device_table(alone_on(options)))
        return
    found = {"one process": on_ranks(1, work, Degrees(), options)[0]}
    for name, degrees in LAYOUTS.items():
        if degrees.size <= options.ranks:
            found[name] = _together(on_ranks(degrees.size, work, degrees, options), found["one process"], degrees.size)
    for each in found.values():
        each.pop("out")
    print(json.dumps(found) if options.json else _table(found, options))


def work(degrees: Degrees, options: argparse.Namespace) -> dict[str, Any]:
    """One rank: the best repeat's seconds and CPU-seconds, bytes sent a step, and what came out."""
    transformer = build_denoiser(options.size)
    given = build_inputs(options.size, options.frames, options.side)
    layout = lay_out(_Pipeline(transformer), degrees)
    pipe = _Pipeline(transformer)
    prompts = {"prompt_embeds": given["conditional"], "negative_prompt_embeds": given["unconditional"]}
    seconds, cpu = [], []
    with torch.no_grad(), layout.sampling(pipe, prompts):
        for repeat in range(WARM_UP + options.repeat):
            torch.distributed.barrier()
            started, used = time.monotonic(), time.process_time()
            traffic = Traffic(degrees.size)
            if repeat == 0:
                with traffic:
                    out = _steps(transformer, given, 1)
                sent = dict(traffic.sent)
            else:
                out = _steps(transformer, given, options.steps)
            seconds.append((time.monotonic() - started) / (1 if repeat == 0 else options.steps))
            cpu.append((time.process_time() - used) / (1 if repeat == 0 else options.steps))
    held = [getattr(weight, "_local_tensor", weight) for weight in transformer.parameters()]
    return {
        "seconds": min(seconds[WARM_UP:]),
        "cpu": min(cpu[WARM_UP:]),
        "sent": sent,
        "weights": sum(part.numel() * part.element_size() for part in held),
        "out": out,
    }


def _steps(transformer: Any, given: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    latents = given["latents"]
    for step in range(steps):
        timestep = torch.full((1,), 1000.0 * (1 - step / steps), device=latents.device)
        conditional, unconditional = (
            transformer(
                hidden_states=latents, timestep=timestep, encoder_hidden_states=given[branch], return_dict=False
            )[0]
            for branch in ("conditional", "unconditional")
        )
        latents = latents - (unconditional + 5 * (conditional - unconditional)) / steps
    return latents


def _together(ranks: list[dict[str, Any]], alone: dict[str, Any], count: int) -> dict[str, Any]:
    """The ranks of one layout as one: the slowest's times, the most that one sends."""
    seconds, cpu = (max(rank[name] for rank in ranks) for name in ("seconds", "cpu"))
    off = max(float((rank["out"] - alone["out"]).abs().max()) for rank in ranks)
    return {
        "ranks": count,
        "seconds": seconds,
        "cpu": cpu,
        "sent": max((rank["sent"] for rank in ranks), key=lambda sent: sum(sent.values())),
        "weights": max(rank["weights"] for rank in ranks),
        "efficiency": alone["seconds"] / (count * seconds),
        "work": alone["cpu"] / (count * cpu),
        "off": off / float(alone["out"].abs().max()),
        "out": None,
    }


@torch.no_grad()
def alone_on(options: argparse.Namespace) -> dict[str, Any]:
    """One process on a GPU, in bfloat16: seconds a step, peak memory, and the model FLOPs of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    device, dtype = options.device, torch.bfloat16
    transformer = build_denoiser(options.size, device=device, dtype=dtype)
    given = build_inputs(options.size, options.frames, options.side, device=device, dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        _steps(transformer, given, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.repeat):
        started = time.monotonic()
        _steps(transformer, given, options.steps)
        torch.cuda.synchronize()
        seconds.append((time.monotonic() - started) / options.steps)
    return {
        "device": torch.cuda.get_device_name(),
        "seconds": min(seconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tflop_per_step": counter.get_total_flops() / 1e12,
        "tflops": counter.get_total_flops() / 1e12 / min(seconds),
    }


def _table(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    tokens = options.frames * (options.side // 2) ** 2
    alone = found["one process"]
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"{options.size}: {CONFIGS[options.size]['num_layers']} layers, {tokens} tokens, float32, CPUs, gloo, one thread"
        f" a rank, {cores} cores; a step is both branches",
        f"{'':20}{'s a step':>10}{'CPU-s a rank':>14}{'ideal':>8}{'MB sent':>9}{'weights MB':>12}{'work':>7}"
        f"{'efficiency':>12}{'largest error':>15}",
        f"{'one process':20}{alone['seconds']:>10.3f}{alone['cpu']:>14.3f}{alone['cpu']:>8.3f}{0:>9.1f}"
        f"{alone['weights'] / 1e6:>12.1f}",
    ]
    for name, row in found.items():
        if name == "one process":
            continue
        efficiency = f"{row['efficiency']:.2f}" if row["ranks"] <= cores else "-"
        lines.append(
            f"{name:20}{row['seconds']:>10.3f}{row['cpu']:>14.3f}{alone['cpu'] / row['ranks']:>8.3f}"
            f"{sum(row['sent'].values()) / 1e6:>9.1f}{row['weights'] / 1e6:>12.1f}{row['work']:>7.2f}"
            f"{efficiency:>12}{row['off']:>15.1e}"
        )
        if name in TARGETS and row["ranks"] <= cores:
            met = "met" if row["efficiency"] >= TARGETS[name] else "MISSED"
            lines[-1] += f"   target {TARGETS[name]}: {met}"
    return "\n".join(lines)


def _device_table(found: dict[str, Any]) -> str:
    return (
        f"{found['device']}: {found['seconds']:.3f} s a step, {found['tflops']:.0f} TFLOP/s,"
        f" {found['peak_gib']:.1f} GiB at the peak"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(CONFIGS), default="small")
    parser.add_argument("--frames", type=int, default=33, help="latent frames")
    parser.add_argument("--side", type=int, default=16, help="latent height and width")
    parser.add_argument("--steps", type=int, default=2, help="steps of one repeat")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4, help="leave out layouts of more ranks")
    parser.add_argument("--device", default="cpu", help="cuda: one process on a GPU, in bfloat16")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
