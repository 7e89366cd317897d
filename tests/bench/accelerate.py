"""Each technique alone at two settings, fewer steps, and combinations: cost at the denoiser, and what is lost. On the pack.

    ditmill bench accelerate [--samples 256] [--plan plans/....json ...] [--only guidance] [--plot accelerate.png] [--json]
    python -m tests.bench.accelerate --gpu [--size wan-1.3b] [--frames 81] [--height 480] [--width 832]

Two baselines stand in the same run: 50 steps with guidance, and 20 steps of UniPC with a first-block cache. All plans sample
the same held-out prompts from the same noise, by the stages of a run, on one thread, without Ray; every plan on every batch
in turn. PSNR is against the clips of 50 steps. Attributes are read by the oracle; intervals are 95%, by bootstrap over
samples, that of a difference by bootstrap over pairs. --plan adds what `ditmill tune` found.

With --gpu the denoiser is a randomly initialised Wan of a true size in bfloat16: real speed and memory and no pictures,
against the bare compiled sampler. What is skipped by data is meaningless there, so such techniques stand at both ends: never
and always.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DITMILL_LOG_LEVEL", "ERROR")  # that a technique skips nothing is a result here

import numpy as np

from infra.telemetry import configure
from models.loading import GeneratorRef
from models.plan import SamplerPlan
from models.source import resolve
from pipelines.plan_file import read_plan
from pipelines.sampling import Sampler, planned, sampler_plan
from pipelines.sections import PACK_GUIDANCE
from tests.bench.pack import say
from tests.bench.support import figures as shown
from tests.bench.support.accelerated import Sampled, apart_from, arms_of, figures, rows, sample_all, table
from tests.bench.support.output_file import output_file
from tests.bench.support.pack_parts import batches, held_out


def main() -> None:
    options = _arguments()
    configure()
    if options.gpu:
        from tests.bench.support.gpu_sampler import bench

        bench(options)
        return
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    ref = GeneratorRef(resolve(options.model, "generator"))
    asked = held_out(options.samples, options.seed)
    tuned = {path.stem: _plan(path) for path in options.plan}
    ratios = measured_ratios(ref, options)
    arms = arms_of(ref, options.guidance, options.steps, options.few, tuned, ratios)
    if options.only:
        arms = [*arms[:2], *(arm for arm in arms[2:] if any(word in f"{arm.kind} {arm.name}" for word in options.only))]
    sample_all(arms, asked, options.batch_size, options.seed, say)
    if options.plot:
        plot(arms, options.plot)
    found = list(figures(arms))
    if options.json:
        print(json.dumps({"plans": rows(arms), "figures": [figure.as_dict() for figure in found]}))
        return
    where = f"one thread, batches of {options.batch_size}"
    print(f"{options.model}: {options.samples} held-out prompts, seed {options.seed}, {where}")
    print(table(arms))
    print(shown.table(found))


def measured_ratios(ref: GeneratorRef, options: argparse.Namespace) -> tuple[float, ...]:
    """MagCache's, on prompts that are not measured on; none where no such plan is asked for."""
    if options.only and not any(word in "magcache" for word in options.only):
        return ()
    from models.accelerate.magcache import calibrate
    from models.generator import load_generator

    generator = load_generator(ref)
    generator.load("sample")
    plan = SamplerPlan(num_inference_steps=options.steps, guidance_scale=options.guidance)
    others = held_out(options.batch_size, options.seed + 1)

    def sample() -> None:
        list(batches(ref, plan, others, options.batch_size, options.seed, lambda _: None, {}))

    return tuple(round(ratio, 4) for ratio in calibrate(generator.denoisers[0], sample))


def _plan(path: Path) -> SamplerPlan:
    return sampler_plan(planned(Sampler(), read_plan(path).sampler))


def plot(arms: list[Sampled], path: Path) -> None:
    """Accuracy beside that of 50 steps over CPU-seconds; a colour for each technique."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    kinds = list(dict.fromkeys(arm.kind for arm in arms))
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, max(2, len(kinds))))
    for kind, colour in zip(kinds, colours, strict=False):
        mine = [arm for arm in arms if arm.kind == kind]
        apart = [apart_from(arm, arms[0]) for arm in mine]
        errors = np.array([[value - low, high - value] for value, (low, high) in apart]).T
        axis.errorbar(
            [arm.cost("sample") for arm in mine],
            [value for value, _ in apart],
            yerr=np.maximum(errors, 0),
            fmt="o",
            markersize=5,
            elinewidth=0.6,
            color=colour,
            label=kind,
        )
    axis.axhline(-1, color="#b45309", linewidth=1, linestyle="--")
    axis.set(
        xlabel="CPU-seconds of denoising a sample", ylabel="points of accuracy beside 50 steps (95%)", xlim=(0, None)
    )
    axis.set_title(f"pack://shapes, {len(arms[0].right)} held-out prompts")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    say(f"wrote {path}", always=True)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="held-out prompts")
    parser.add_argument("--model", default="pack://shapes", help="folder or name of a generator of the shapes world")
    parser.add_argument("--plan", type=Path, nargs="*", default=[], help="plan files of ditmill tune")
    parser.add_argument("--only", nargs="*", default=[], help="only plans whose name or technique holds one of these")
    parser.add_argument("--steps", type=int, default=20, help="of techniques alone")
    parser.add_argument("--few", type=int, default=8, help="of sigmas, solvers and combinations")
    parser.add_argument("--guidance", type=float, default=PACK_GUIDANCE, help="guidance_scale")
    parser.add_argument("--batch-size", type=int, default=16, help="samples denoised together")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other prompts and noise")
    parser.add_argument("--plot", type=output_file, help="draw cost and accuracy into this PNG")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--gpu", action="store_true", help="speed and memory of a random denoiser of a true size")
    parser.add_argument("--size", default="wan-1.3b", choices=["small", "wan-1.3b"], help="--gpu: of the denoiser")
    parser.add_argument("--frames", type=int, default=81, help="--gpu: 4k+1")
    parser.add_argument("--height", type=int, default=480, help="--gpu: pixels")
    parser.add_argument("--width", type=int, default=832, help="--gpu: pixels")
    parser.add_argument("--device", default="cuda", help="--gpu: cpu only to try the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
