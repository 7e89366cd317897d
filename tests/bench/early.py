"""What stopping hopeless samples saves, and what of the good ones it loses.

    ditmill bench early [--samples 64] [--at 0.7] [--frames 5] [--shift 1] [--reject 0.5] [--loss 0.01] [--seed 0]

Prompts of the shapes world, sampled by the pack's generator; good is what its judge finds to match, above a bar so high that
about --reject of them are not. One half of the samples goes to its end with early scores, and gives bar and threshold. The
other half is made twice, to its end and with that threshold. Where a half has fewer good samples than --loss needs, the
threshold is for the least loss that so few can hold, which is told. --shift is the plan's; the checkpoint's own is 3, whose
steps lie closer where there is much noise. Denoiser work is counted in samples that go through its blocks, padding included.
One thread, CPU-seconds. Every figure is of the pack.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from models.generator import load_generator
from models.loading import GeneratorRef
from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
from models.pack.marks import marks
from models.pack.train.intervals import bootstrap, wilson
from models.pack.train.judge_exam import auroc
from models.plan import SamplerPlan
from models.source import resolve
from pipelines.operating_point import CONFIDENCE, by_loss, least_for
from pipelines.sections import PACK_GUIDANCE
from stages.batch import load_json
from stages.early import NAME, EarlyReject
from stages.rubric import load_rubric
from tests.bench.support.figures import Figure, resampled, share, table
from tests.bench.support.judged_clips import BATCH, prompts
from tests.bench.support.pack_parts import Asked, batches

SAVED, LOST = 20.0, 1.0
"""To reach, in percent: denoiser work saved at least, good samples lost at most."""
QUESTION = "prompt_match"
SHOWN = 8
"""Frames that the judge is shown."""


@dataclass(frozen=True)
class Made:
    """P(yes) of the finished clips, what the oracle says of them, and which were stopped, each [n]; latents [n, ...]; rows
    that went through the denoiser's blocks; CPU-seconds of sampling. Where samples were looked at: their early scores [n],
    and after which step."""

    final: np.ndarray
    right: np.ndarray
    stopped: np.ndarray
    latents: np.ndarray
    rows: int
    seconds: float
    early: np.ndarray
    step: int


def main() -> None:
    import torch

    torch.set_num_threads(1)
    options = _arguments()
    ref, judge = (
        GeneratorRef(resolve("pack://shapes", "generator")),
        MultimodalRef(resolve("pack://shapes", "judge")),
    )
    plan = SamplerPlan(
        num_inference_steps=options.steps, guidance_scale=PACK_GUIDANCE, max_sequence_length=48, shift=options.shift
    )
    questions = load_rubric("default").only([QUESTION])
    look = EarlyReject(options.at, options.frames, "bench", questions, judge, num_frames=SHOWN, hold_out=0.0)
    asked = prompts(options.samples, options.seed, "all")
    first, second = _part(asked, 0), _part(asked, 1)
    _make(ref, judge, replace(plan, num_inference_steps=4), _part(asked, 0, 2), None, -math.inf)  # all have run once
    calibrating = _make(ref, judge, plan, first, look, -math.inf)
    bar = float(np.quantile(calibrating.final, options.reject))
    good = calibrating.early[calibrating.final >= bar]
    loss = max(options.loss, 1 - (1 - CONFIDENCE) ** (1 / len(good)) + 1e-9)
    found = by_loss(good, loss)
    assert found is not None
    _say(f"bar {bar:.3f}; threshold {found[0]:.4f} of {len(good)} good samples for a loss of {loss:.2%}")
    whole = _make(ref, judge, plan, second, None, -math.inf)
    part = _make(ref, judge, plan, second, look, found[0])
    figures = list(_figures(whole, part, bar, loss, options))
    if options.json:
        print(json.dumps([figure.as_dict() for figure in figures]))
        return
    at = f"looked at after step {part.step} of {options.steps}"
    print(f"pack://shapes, {options.samples} samples, shift {options.shift:g}, {at}; half of them calibrate")
    if len(good) < least_for(options.loss):
        print(
            f"{len(good)} good samples hold a loss of {loss:.2%} at best; {least_for(options.loss)} hold {options.loss:.2%}"
        )
    print(table(figures))


def _figures(whole: Made, part: Made, bar: float, loss: float, options: argparse.Namespace) -> Iterator[Figure]:
    good, count = whole.final >= bar, len(whole.final)
    on = ~part.stopped
    left = 1 - part.step / options.steps
    yield share("samples", "right by the oracle, all finished", int(whole.right.sum()), count)
    yield share("samples", "rejected, all finished", int((~good).sum()), count)
    yield resampled("look", "AUROC of the early score", auroc, part.early, good)
    yield share("look", "stopped, of those rejected", int((part.stopped & ~good).sum()), int((~good).sum()))
    low, high = bootstrap(lambda each: 100 * left * float(each.mean()), part.stopped.astype(float))
    yield Figure("saved", "of denoiser work, by samples", 100 * left * part.stopped.mean(), count, low, high, "%")
    saved = 100 * (1 - part.rows / whole.rows)
    yield Figure("saved", "of denoiser work, padding included", saved, count, unit="%", target=SAVED)
    seconds = 100 * (1 - part.seconds / whole.seconds)
    yield Figure("saved", "of sampling's CPU-seconds, looks paid", seconds, count, unit="%")
    lost, total = int((part.stopped & good).sum()), int(good.sum())
    low, high = wilson(lost, total)
    yield Figure("lost", "of good samples", 100 * lost / total, total, 100 * low, 100 * high, "%", LOST, "at most")
    yield Figure("lost", "most that the threshold is to lose", 100 * loss, unit="%")
    right = int((part.stopped & whole.right).sum())
    yield share("lost", "right by the oracle, of those stopped", right, int(part.stopped.sum()))
    apart = float(np.abs(whole.latents[on] - part.latents[on]).max()) if on.any() else None
    yield Figure("the others", "largest difference of a latent", apart, int(on.sum()))
    yield Figure(
        "the others", "same verdict", 100 * float(((part.final >= bar) == good)[on].mean()), int(on.sum()), unit="%"
    )


def _make(
    ref: GeneratorRef, judge: MultimodalRef, plan: SamplerPlan, asked: Asked, look: EarlyReject | None, below: float
) -> Made:
    seconds: dict[str, list[float]] = {}
    made, clips = [], []
    with _rows(ref) as rows:
        for batch in batches(ref, plan, asked, BATCH, 7, _say, seconds, look, below):
            made.append(batch)
            clips.append(batch["frames"])
    shown = evenly_spaced(np.concatenate(clips), SHOWN)
    question = load_rubric("default").only([QUESTION]).questions[0]
    texts = [[question.format(prompt, asked.num_frames)] for prompt in asked.prompts]
    model = load_multimodal(judge)
    final = [model.p_yes(shown[at : at + BATCH], texts[at : at + BATCH])[:, 0] for at in range(0, len(shown), BATCH)]
    scored = [load_json(batch["scores"]) for batch in made if look]
    scores = [each["value"] for rows_of in scored for row in rows_of for each in row if each["name"] == NAME]
    right = [
        marks(clip, prompt)[QUESTION] > 0 for clip, prompt in zip(np.concatenate(clips), asked.prompts, strict=True)
    ]
    return Made(
        np.concatenate(final),
        np.array(right),
        np.concatenate([batch["error_type"] != "" for batch in made]),
        np.concatenate([batch["latents"] for batch in made]),
        sum(rows),
        BATCH * sum(seconds["sample"]),
        np.array(scores),
        json.loads(made[0][NAME][0])["step"] if look else 0,
    )


@contextmanager
def _rows(ref: GeneratorRef) -> Iterator[list[int]]:
    """How many rows each call of the denoiser's first block has, inside."""
    generator, seen = load_generator(ref), []
    generator.load("sample")
    block = generator._pipe("sample").transformer.blocks[0]
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def _part(asked: Asked, start: int, count: int | None = None) -> Asked:
    """Every other prompt, from the first or the second on."""
    rows = slice(start, None if count is None else 2 * count, 2)
    return Asked(asked.scenes[rows], asked.prompts[rows], asked.num_frames, asked.indices[rows])


_started = time.monotonic()


def _say(text: str) -> None:
    print(f"{time.monotonic() - _started:6.0f} s  {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="of which half calibrate")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--shift", type=float, default=1.0, help="flow shift of the plan")
    parser.add_argument("--at", type=float, default=0.7, help="noise level at which samples are looked at")
    parser.add_argument("--frames", type=int, default=5, help="latent frames that are decoded; the pack's clips have 5")
    parser.add_argument("--reject", type=float, default=0.5, help="share of samples that the judge's bar rejects")
    parser.add_argument("--loss", type=float, default=0.01, help="most of the good samples that may be lost")
    parser.add_argument("--seed", type=int, default=0, help="other prompts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
