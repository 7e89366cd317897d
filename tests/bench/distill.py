"""A student against its teacher on held-out prompts, from the same noise: accuracy, cost and variety.

    ditmill bench distill [--student runs/student] [--one-step runs/one] [--samples 1000] [--sheet sheet.png] [--json]
    ditmill bench distill --ablation runs/of-accepted runs/of-all

The student is pack://shapes-4step where none is named. The teacher's own checkpoint at as few steps stands beside it: that is
what a student starts from. An ablation's two students stand beside the teacher alone. Models are run by the code of a run,
without Ray, on one thread, and every arm on every batch of prompts in turn. Attributes are read by the oracle. Intervals are
95%: Wilson's for the share of samples, else bootstrap over samples, for variety over prompts; where two arms are compared, of
the paired difference.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from models.hand_off import check_hand_off
from models.loading import GeneratorRef, TeacherRef
from models.pack import pack_names
from models.plan import SamplerPlan
from models.source import content_sha256, resolve
from pipelines.sections import PACK_GUIDANCE
from tests.bench.pack import say
from tests.bench.support.contact_sheet import contact_sheet
from tests.bench.support.distilled import (
    KEPT,
    Arm,
    Targets,
    compared,
    figures_of,
    make_samples,
    measure_diversity,
)
from tests.bench.support.figures import Figure, table
from tests.bench.support.output_file import output_file
from tests.bench.support.pack_parts import Asked, held_out

COLUMNS = 4
FEW = Targets(points=-3.0, times=8.0, diversity=80.0)
ONE = Targets(points=-12.0)
HANDED = Targets(diversity=95.0)


def main() -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    options = _arguments()
    arms, ablation = arms_of(options)
    asked = held_out(options.samples, options.seed)
    make_samples([*arms, *ablation], asked, options.batch_size, options.seed, say)
    if options.prompts:
        varied = held_out(options.prompts, options.seed)
        size = min(options.batch_size, options.noises)
        measure_diversity(arms, varied, options.noises, size, options.seed, say)
    if options.sheet:
        save_sheet(arms, asked, options.sheet)
    figures = [figure for arm in (*arms, *ablation) for figure in figures_of(arm, arms[0])]
    if ablation:
        figures += compared(ablation[0], ablation[1], "those of all samples")
    report(figures, options)


def report(figures: list[Figure], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([figure.as_dict() for figure in figures]))
        return
    print(f"{options.samples} held-out prompts, seed {options.seed}, one thread; variety: {options.prompts} prompts of")
    print(
        f"{options.noises} noises. The teacher is {options.teacher}, the student {student_of(options) or 'not there'}."
    )
    print(table(figures))


def student_of(options: argparse.Namespace) -> str:
    """The student's name; empty where there is none."""
    return options.student or ("pack://shapes-4step" if "shapes-4step" in pack_names() else "")


def arms_of(options: argparse.Namespace) -> tuple[list[Arm], list[Arm]]:
    """The teacher first and all that is compared with it; and the two of an ablation, if any."""
    teacher = GeneratorRef(resolve(options.teacher, "generator"))
    few, one = (SamplerPlan(num_inference_steps=steps, guidance_scale=1.0) for steps in (options.few, 1))
    guided = SamplerPlan(num_inference_steps=options.few, guidance_scale=options.guidance)
    whole = SamplerPlan(num_inference_steps=options.steps, guidance_scale=options.guidance)
    guiding = Arm(f"teacher, {options.steps} steps, guided", teacher, whole)
    if options.ablation:
        names = ("trained on accepted", "trained on all")
        return [guiding], [
            Arm(f"{name}, {options.few} steps", GeneratorRef(resolve(path, "generator")), few)
            for name, path in zip(names, options.ablation, strict=True)
        ]
    arms = [
        guiding,
        Arm(f"untrained, {options.few} steps, guided", teacher, guided),
        Arm(f"untrained, {options.few} steps", teacher, few),
    ]
    student = student_of(options)
    if student:
        ref = GeneratorRef(resolve(student, "generator"))
        first = TeacherRef(teacher.path, options.teacher, content_sha256(teacher.path), 1, options.guidance)
        check_hand_off(ref.path, first)
        handed = GeneratorRef(ref.path, teacher=first)
        arms += [
            Arm(f"student, {options.few} steps", ref, few, FEW),
            Arm(f"student, {options.few} steps, 1 teacher's", handed, few, HANDED),
        ]
    if single := options.one_step or student:
        arms.append(Arm("student, 1 step", GeneratorRef(resolve(single, "generator")), one, ONE))
    return arms, []


def save_sheet(arms: list[Arm], asked: Asked, path: Path) -> None:
    """The same prompts by each arm, the teacher above; with what the oracle finds wrong."""
    clips, texts = [], []
    count = min(KEPT, len(asked.prompts))
    columns = min(COLUMNS, count)
    for start in range(0, count - columns + 1, columns):
        for arm in arms:
            for at in range(start, start + columns):
                wrong = ", ".join(name for name, good in arm.right[at].items() if not good)
                clips.append(arm.clips[at])
                texts.append(f"{arm.name}: {asked.prompts[at]}" + (f" [WRONG: {wrong}]" if wrong else ""))
    contact_sheet(np.stack(clips), texts, columns=columns).save(path, optimize=True)
    say(f"wrote {path}", always=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="its folder or name; left out, pack://shapes-4step if it is there")
    parser.add_argument("--one-step", help="another student for one step; left out, the same")
    parser.add_argument("--teacher", default="pack://shapes", help="folder or name of the teacher")
    parser.add_argument(
        "--ablation",
        nargs=2,
        metavar=("ACCEPTED", "ALL"),
        help="students of accepted and of all samples, as many of each",
    )
    parser.add_argument("--samples", type=int, default=1000, help="held-out prompts")
    parser.add_argument("--prompts", type=int, default=64, help="prompts whose variety is measured; 0 for none")
    parser.add_argument("--noises", type=int, default=4, help="samples of each of these")
    parser.add_argument("--sheet", type=output_file, help=f"write the first {KEPT} prompts by each to this PNG")
    parser.add_argument("--steps", type=int, default=20, help="steps of the teacher")
    parser.add_argument("--few", type=int, default=4, help="steps of the student")
    parser.add_argument("--guidance", type=float, default=PACK_GUIDANCE, help="guidance_scale of the teacher")
    parser.add_argument("--batch-size", type=int, default=16, help="samples denoised together")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other prompts and noise")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
