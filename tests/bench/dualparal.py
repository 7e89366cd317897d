"""DualParal over stages: real runs at 1, 2 and 4, and a simulation from measured times for 1 to 16 devices.

    ditmill bench dualparal [--blocks 33] [--block 8] [--context 1] [--steps 5] [--plot dualparal.png]
    python -m tests.bench.dualparal --device cuda --size wan-1.3b --side 60    # without Ray; one GPU: times of one stage

A real run is a queue of blocks through random weights, one thread a rank, over gloo. `efficiency` is T(1) / (P T(P)), `work`
the same of CPU-seconds, the busiest rank's. Runs with more ranks than cores tell their bytes and CPU-seconds alone. The
simulation is driven by the times of a layer and of what every stage does besides, and by the link as both were measured
here; it is checked against the real runs, and carried on to `--layers` layers (30, as Wan 2.1 1.3B has) and to 16 devices,
beside Ulysses over the whole video.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist

from models.parallel.attention import Split
from models.parallel.degrees import Degrees, build_mesh
from models.parallel.dualparal import Blocks, DualParal, Video
from models.parallel.schedule import makespan
from models.parallel.wan import Stage
from tests.bench.support.denoisers import CHANNELS, CONFIGS, build_denoiser, build_inputs
from tests.bench.support.output_file import output_file
from tests.bench.support.simulator import Costs, Link, dualparal, ulysses
from tests.bench.support.traffic import Traffic
from tests.models.parallel.ranks import on_ranks

REAL = (1, 2, 4)
SIMULATED = (1, 2, 4, 8, 16)
TARGET = 0.85
TARGET_AT_8 = 0.9


def main() -> None:
    options = _arguments()
    blocks = Blocks(options.blocks, options.block, options.context)
    found: dict[str, Any] = {"costs": vars(measure(options)), "whole": whole_layer(options, blocks)}
    costs = Costs(**found["costs"])
    if options.device == "cpu":
        found["link"] = vars(on_ranks(2, ping, costs.hidden)[0])
        found["real"] = {count: real(count, options, blocks) for count in REAL if count <= options.ranks}
    else:
        found["link"] = {"latency": 1e-5, "rate": options.link * 1e9}
    link = Link(**found["link"])
    layers = CONFIGS[options.size]["num_layers"]
    for count, row in found.get("real", {}).items():
        row["simulated"] = vars(dualparal(blocks.count, options.steps, count, layers, costs, link))
    far = Blocks(options.far_blocks, options.block, options.context)
    found["far"] = {
        count: {
            "dualparal": vars(dualparal(far.count, options.far_steps, count, options.layers, costs, link)),
            "ulysses": vars(far_ulysses(count, options, far, found["whole"], costs, link)),
            "balanced": balanced(far.count, options.far_steps, count),
        }
        for count in SIMULATED
    }
    if options.plot:
        plot(found, options, far)
    print(json.dumps(found) if options.json else _table(found, options, blocks, far))


@torch.no_grad()
def measure(options: argparse.Namespace) -> Costs:
    """Seconds of a window through stages of all layers, of all but both ends, and of none."""
    device, dtype = options.device, torch.float32 if options.device == "cpu" else torch.bfloat16
    torch.set_num_threads(1)
    layers = CONFIGS[options.size]["num_layers"]
    transformer = build_denoiser(options.size, device=device, dtype=dtype)
    frames = options.block + options.context
    given = build_inputs(options.size, frames, options.side, device=device, dtype=dtype)
    shape = tuple(given["latents"].shape)
    timestep = torch.full((1,), 500.0, device=device)
    seconds = {}
    for name, part in (("all", range(layers)), ("inner", range(1, layers - 1)), ("none", range(1, 1))):
        stage = Stage(transformer, part, Split())
        tokens = frames * (options.side // 2) ** 2
        stage.window.tokens, stage.window.kept = tokens, (0, options.context * tokens // frames)
        hidden = torch.randn(stage.hidden_shape(shape), device=device, dtype=dtype)
        enters = given["latents"] if part.start == 0 else hidden
        stage(enters, shape, frames + options.context, timestep, given["conditional"])
        stage.window.future = stage.window.fresh
        seconds[name] = min(
            _timed(lambda: stage(enters, shape, frames + options.context, timestep, given["conditional"]), device)  # noqa: B023
            for _ in range(options.repeat)
        )
        stage.close()
    layer = (seconds["inner"] - seconds["none"]) / (layers - 2)
    size = hidden.element_size()
    weights = sum(weight.numel() * weight.element_size() for weight in transformer.blocks[0].parameters())
    tokens = hidden.shape[1]
    return Costs(
        layer=layer,
        fixed=seconds["none"],
        ends=max(0.0, seconds["all"] - layers * layer - seconds["none"]),
        weights=weights,
        hidden=hidden.numel() * size,
        velocity=4.0 * CHANNELS * options.block * options.side**2,
        cache=2.0 * tokens * options.context / frames * hidden.shape[2] * size,
    )


@torch.no_grad()
def whole_layer(options: argparse.Namespace, blocks: Blocks) -> dict[str, float]:
    """Seconds of one layer over a whole video, and its tokens: all of it where that is quick, else told from a part.

    Attention is quadratic in tokens and all else linear: two lengths give both.
    """
    device, dtype = options.device, torch.float32 if options.device == "cpu" else torch.bfloat16
    transformer = build_denoiser(options.size, layers=1, device=device, dtype=dtype)
    a_frame = (options.side // 2) ** 2
    lengths = [min(blocks.total, part) for part in (16, 64)]
    seconds = []
    for frames in lengths:
        given = build_inputs(options.size, frames, options.side, device=device, dtype=dtype)
        timestep = torch.full((1,), 500.0, device=device)

        def run(given: dict[str, torch.Tensor] = given, timestep: torch.Tensor = timestep) -> Any:
            return transformer(given["latents"], timestep, given["conditional"], return_dict=False)

        run()
        seconds.append(min(_timed(run, device) for _ in range(options.repeat)))
    (short, long), (fast, slow) = (frames * a_frame for frames in lengths), seconds
    quadratic = max(0.0, (slow / long - fast / short) / (long - short)) if long > short else 0.0
    return {"linear": max(0.0, fast / short - quadratic * short), "quadratic": quadratic}


def far_ulysses(
    ranks: int, options: argparse.Namespace, far: Blocks, whole: dict[str, float], costs: Costs, link: Link
) -> Any:
    tokens = far.total * (options.side // 2) ** 2
    seconds = whole["linear"] * tokens + whole["quadratic"] * tokens**2
    per_token = costs.hidden / ((options.block + options.context) * (options.side // 2) ** 2)
    return ulysses(tokens, options.far_steps, ranks, options.layers, seconds, per_token, costs.weights, link)


def balanced(blocks: int, steps: int, stages: int) -> float:
    """Efficiency of the schedule alone, were every stage as long as the others and links free."""
    return blocks * steps / makespan(blocks, steps, stages)


def ping(size: float) -> Link:
    """The link between two ranks, from messages of one number and of `size` bytes to and fro."""
    other = 1 - dist.get_rank()
    seconds = []
    for count in (1, int(size) // 4):
        message = torch.zeros(count)
        trials = []
        for _ in range(20):
            started = time.monotonic()
            if other:
                dist.send(message, other)
                dist.recv(message, other)
            else:
                dist.recv(message, other)
                dist.send(message, other)
            trials.append((time.monotonic() - started) / 2)
        seconds.append(sorted(trials)[len(trials) // 2])
    return Link(seconds[0], size / max(seconds[1] - seconds[0], 1e-9))


def real(count: int, options: argparse.Namespace, blocks: Blocks) -> dict[str, Any]:
    ranks = on_ranks(count, run, count, options, blocks)
    return {
        "seconds": max(rank["seconds"] for rank in ranks),
        "cpu": max(rank["cpu"] for rank in ranks),
        "sent": max(rank["sent"] for rank in ranks),
        "total": ranks[0]["total"],
    }


def run(count: int, options: argparse.Namespace, blocks: Blocks) -> dict[str, Any]:
    """One rank of a real run: seconds, CPU-seconds, bytes sent, and a sum over all latents in fixed point."""
    from diffusers import UniPCMultistepScheduler

    def scheduler() -> Any:
        made = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        made.set_timesteps(options.steps)
        return made

    transformer = build_denoiser(options.size)
    given = build_inputs(options.size, blocks.frames + blocks.context, options.side)
    text = (given["conditional"], given["unconditional"])
    stages = build_mesh(Degrees(dualparal=count))["dualparal"].get_group() if count > 1 else None
    sampler = DualParal([transformer], scheduler, steps=options.steps, guidance_scale=1.0, stages=stages)
    dist.barrier()
    started, used = time.monotonic(), time.process_time()
    total = 0
    video = Video(given["latents"], lambda block: text, [torch.Generator().manual_seed(0)])
    with Traffic(count) as traffic:
        for _, _, latents in sampler.sample([video], blocks):
            total += int((latents.double() * 2**20).round().sum())
    dist.barrier()
    return {
        "seconds": time.monotonic() - started,
        "cpu": time.process_time() - used,
        "sent": traffic.total,
        "total": total,
    }


def _timed(function: Any, device: str) -> float:
    started = time.monotonic()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.monotonic() - started


def _table(found: dict[str, Any], options: argparse.Namespace, blocks: Blocks, far: Blocks) -> str:
    cores = len(os.sched_getaffinity(0))
    costs, link = found["costs"], found["link"]
    lines = [
        f"{options.size}, {options.device}: a layer {1e3 * costs['layer']:.2f} ms, beside it a stage"
        f" {1e3 * costs['fixed']:.2f} ms, both ends {1e3 * costs['ends']:.2f} ms;"
        f" link {1e3 * link['latency']:.2f} ms and {link['rate'] / 1e9:.2f} GB/s",
    ]
    if "real" in found:
        alone = found["real"][1]
        lines += [
            "",
            f"Real: {blocks.count} blocks of {blocks.frames} latent frames, {options.steps} steps,"
            f" {CONFIGS[options.size]['num_layers']} layers, {cores} cores",
            f"{'stages':>8}{'seconds':>10}{'simulated':>11}{'CPU-s a rank':>14}{'ideal':>8}{'MB sent':>9}{'simulated':>11}"
            f"{'work':>7}{'efficiency':>12}{'same bits':>11}",
        ]
        for count, row in found["real"].items():
            within = count <= cores
            efficiency = alone["seconds"] / (count * row["seconds"])
            line = (
                f"{count:>8}{row['seconds']:>10.2f}{row['simulated']['seconds']:>11.2f}{row['cpu']:>14.2f}"
                f"{alone['cpu'] / count:>8.2f}{row['sent'] / 1e6:>9.1f}{row['simulated']['sent'] / 1e6:>11.1f}"
                f"{alone['cpu'] / (count * row['cpu']):>7.2f}{f'{efficiency:.2f}' if within else '-':>12}"
                f"{'yes' if row['total'] == alone['total'] else 'NO':>11}"
            )
            if count == 2 and within:
                line += f"   target {TARGET}: {'met' if efficiency >= TARGET else 'MISSED'}"
            lines.append(line)
    one = found["far"][1]
    lines += [
        "",
        f"Simulated: {4 * far.total - 3} frames ({far.total} latent), {options.layers} layers, {options.far_steps} steps",
        f"{'devices':>8}{'DualParal s':>13}{'efficiency':>12}{'schedule':>10}{'layers':>8}{'GB sent':>9}{'GB held':>9}"
        f"{'Ulysses s':>12}{'efficiency':>12}{'GB sent':>9}{'GB held':>9}",
    ]
    for count, row in found["far"].items():
        pipe, whole = row["dualparal"], row["ulysses"]
        longest = -(-options.layers // count)
        efficiency = one["dualparal"]["seconds"] / (count * pipe["seconds"])
        line = (
            f"{count:>8}{pipe['seconds']:>13.1f}{efficiency:>12.2f}{row['balanced']:>10.2f}"
            f"{options.layers / (count * longest):>8.2f}{pipe['sent'] / 1e9:>9.2f}{pipe['held'] / 1e9:>9.3f}"
            f"{whole['seconds']:>12.1f}{one['ulysses']['seconds'] / (count * whole['seconds']):>12.2f}"
            f"{whole['sent'] / 1e9:>9.2f}{whole['held'] / 1e9:>9.3f}"
        )
        if count == 8:
            line += f"   target {TARGET_AT_8}: {'met' if efficiency >= TARGET_AT_8 else 'MISSED'}"
        lines.append(line)
    lines.append(
        "schedule: were all stages alike and links free; layers: how even the layers divide; both bound efficiency"
    )
    return "\n".join(lines)


def plot(found: dict[str, Any], options: argparse.Namespace, far: Blocks) -> None:
    """Seconds, bytes sent and bytes held over devices, DualParal beside Ulysses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = {
        "seconds": ("seconds a video", 1.0),
        "sent": ("GB sent by a device", 1e9),
        "held": ("GB held by a device", 1e9),
    }
    for axis, (name, (title, unit)) in zip(axes, panels.items(), strict=True):
        for way, colour in (("dualparal", "#2563eb"), ("ulysses", "#b45309")):
            values = [row[way][name] / unit for row in found["far"].values()]
            points = [(count, value) for count, value in zip(found["far"], values, strict=True) if value > 0]
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                color=colour,
                label={"dualparal": "DualParal"}.get(way, "Ulysses"),
            )
        axis.set(title=title, xlabel="devices", xscale="log", yscale="log", xticks=list(found["far"]))
        axis.set_xticklabels([str(count) for count in found["far"]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"Simulated from times measured on {options.device}: {4 * far.total - 3} frames, {options.layers} layers,"
        f" {options.far_steps} steps, {options.size}",
        fontsize=10,
    )
    figure.savefig(options.plot, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(CONFIGS), default="small")
    parser.add_argument("--blocks", type=int, default=33, help="of the real runs")
    parser.add_argument("--block", type=int, default=8, help="latent frames of a block")
    parser.add_argument("--context", type=int, default=1, help="latent frames of context")
    parser.add_argument("--side", type=int, default=16, help="latent height and width")
    parser.add_argument("--steps", type=int, default=5, help="of the real runs")
    parser.add_argument("--ranks", type=int, default=4, help="leave out real runs of more ranks")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30, help="of the simulated denoiser")
    parser.add_argument("--far-blocks", type=int, default=32, help="of the simulated video")
    parser.add_argument("--far-steps", type=int, default=50, help="of the simulated video")
    parser.add_argument("--device", default="cpu", help="cuda: times of one GPU, in bfloat16, and no real runs")
    parser.add_argument("--link", type=float, default=25.0, help="GB/s between GPUs, where none can be measured")
    parser.add_argument("--plot", type=output_file, help="draw the simulation into this PNG")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
