"""Whether the judge's probabilities hold on clips that it did not learn from, and what choosing by them does.

    ditmill bench calibration [--samples 96] [--prompts 32] [--keep out/calibration] [--plot calibration.png]

Right is what the oracle says. Each source of clips differs from `trained` in one thing: `held-out` in prompts of combinations
of attributes that no training showed, the next three in the plan, the others in having no generator. Each clip is asked
about with its own prompt, as in a run, and with one that is wrong in one attribute. Calibration error is that of ten
bins of equally many clips. Then the best of 8 samples by the judge, and what its default thresholds do to the variety of
what is good. One thread; clips and answers are kept in --keep, so that a rerun is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from models.pack.oracle import match
from models.pack.train.judge_exam import auroc
from models.plan import SamplerPlan
from pipelines.operating_point import LEAST, by_precision
from pipelines.sections import PACK_GUIDANCE
from tests.bench.support.calibrated import (
    best_of,
    bins,
    calibration_error,
    error_by_chance,
    error_interval,
    from_other_half,
    isotonic,
    lost,
    pairs,
    platt,
    values,
)
from tests.bench.support.contact_sheet import contact_sheet
from tests.bench.support.figures import Figure, resampled, share, table
from tests.bench.support.judged_clips import QUESTIONS, Bench, JudgedClips, prompts
from tests.bench.support.output_file import output_file

USUAL = SamplerPlan(guidance_scale=PACK_GUIDANCE)
PLANS = {
    "6 steps": replace(USUAL, num_inference_steps=6),
    "unguided": replace(USUAL, scheduler="euler", guidance_scale=1.0),
    "guidance 5": replace(USUAL, guidance_scale=5.0),
}
STUDENT, FEW = "pack://shapes-4step", SamplerPlan(num_inference_steps=4, guidance_scale=1.0)
EACH = 8
OWN, ELSEWHERE, GAIN, LOSS = 0.97, 0.93, 0.7, 5.0
"""To reach: AUROC on the pack's generator and elsewhere, the oracle's gain by the judge's claim, percent of coverage lost."""
PRECISION = 0.95
WORST = 32


def main() -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    options = _arguments()
    bench = Bench(options.seed, options.keep, _say, options.model)
    trained = prompts(options.samples, options.seed, "train")
    held_out = prompts(options.samples, options.seed, "held_out")
    sources = {"trained": bench.generated(USUAL, trained), "held-out": bench.generated(USUAL, held_out)}
    sources |= {name: bench.generated(plan, trained) for name, plan in PLANS.items()}
    sources |= {"student": bench.generated(FEW, trained, STUDENT)}
    sources |= {"rendered": bench.rendered(trained), "rendered held-out": bench.rendered(held_out)}
    sources |= {"spoilt": bench.spoilt(trained)}
    many = bench.generated(USUAL, prompts(options.prompts, options.seed, "all", each=EACH))
    figures = [figure for name, clips in sources.items() for figure in source(name, clips)]
    figures += [
        *blind([sources["rendered"], sources["rendered held-out"]]),
        *mended(sources),
        *carried(sources),
        *chosen(many),
        *coverage([sources["trained"], sources["held-out"], many]),
    ]
    if options.plot:
        plot(sources, many, options.plot)
    if options.sheet:
        sheet(sources["trained"], sources["held-out"]).save(options.sheet, optimize=True)
    if options.json:
        print(json.dumps([figure.as_dict() for figure in figures]))
        return
    print(f"{options.samples} clips a source, {options.prompts} prompts of {EACH} samples, seed {options.seed}")
    print(table(figures))


def source(name: str, clips: JudgedClips) -> Iterator[Figure]:
    """prompt_match on one source of clips."""
    target = OWN if name in ("trained", "held-out") else ELSEWHERE
    own, right = clips.p_yes[:, 0], clips.marks[:, 0]
    both, both_right = np.concatenate([own, clips.altered_p_yes]), np.concatenate([right, clips.altered_match])
    yield share(name, "right by the oracle", int(right.sum()), len(right))
    yield share(name, "right of those that the judge keeps", int(right[own >= 0.5].sum()), int((own >= 0.5).sum()))
    yield resampled(name, "AUROC, own prompts", auroc, own, right, target=target)
    yield resampled(name, "AUROC, own and altered prompts", auroc, both, both_right, target=target)
    yield resampled(name, "mean P(yes), own prompts", lambda each: float(each.mean()), own)
    yield error(name, "calibration error, own prompts", own, right)
    yield Figure(name, "the same of a calibrated judge, by chance", error_by_chance(own), len(own))
    yield error(name, "calibration error, own and altered prompts", both, both_right)
    yield resampled(name, "Brier score, own prompts", lambda p, r: float(np.square(p - r).mean()), own, right)


def error(part: str, name: str, p_yes: np.ndarray, right: np.ndarray) -> Figure:
    return Figure(part, name, calibration_error(p_yes, right), len(right), *error_interval(p_yes, right))


def blind(sources: Sequence[JudgedClips]) -> Iterator[Figure]:
    """AUROC of rendered clips' own prompts against prompts in which one attribute is another."""
    own = np.concatenate([clips.p_yes[:, 0] for clips in sources])
    other = np.concatenate([clips.altered_p_yes for clips in sources])
    found = [
        [name for name, good in match(reading, scene).items() if not good]
        for clips in sources
        for reading, scene in zip(clips.readings, clips.others, strict=True)
    ]
    for name in ("shape", "colour", "background", "size", "motion"):
        # A size may go with the motion.
        rows = [at for at, wrong in enumerate(found) if wrong == [name] or (name == "motion" and name in wrong)]
        scores, right = np.concatenate([own, other[rows]]), np.repeat([True, False], [len(own), len(rows)])
        yield resampled("rendered", f"AUROC, {name} altered", auroc, scores, right)


def mended(sources: dict[str, JudgedClips]) -> Iterator[Figure]:
    """Calibration error, own prompts, once P(yes) is mapped by what was fitted on other clips."""
    first = sources["trained"]
    for fit in (platt, isotonic):
        kind = fit.__name__
        for name, clips in sources.items():
            own, right = clips.p_yes[:, 0], clips.marks[:, 0]
            if not all(0 < half.sum() < len(half) for half in (right[::2], right[1::2])):
                continue
            halves = from_other_half(fit, own, right)
            yield error(kind, f"calibration error, {name}, by the other half", halves, right)
            if clips is not first:
                mapped = fit(first.p_yes[:, 0], first.marks[:, 0])(own)
                yield error(kind, f"calibration error, {name}, by trained", mapped, right)


def carried(sources: dict[str, JudgedClips]) -> Iterator[Figure]:
    """What `judge.thresholds: {precision: ...}` finds on trained, on each source."""
    first = sources["trained"]
    scores, right = first.p_yes[:, 0].astype(float), first.marks[:, 0]
    enough = min(right.sum(), (~right).sum()) >= LEAST
    point = by_precision("prompt_match", "", scores, right, PRECISION) if enough else None
    if point is None:
        yield Figure("threshold", f"of precision {PRECISION:g}, on trained", None, note="there is none")
        return
    yield Figure("threshold", f"of precision {PRECISION:g}, on trained", point.threshold, point.samples)
    for name, clips in sources.items():
        clear, right = clips.p_yes[:, 0] >= point.threshold, clips.marks[:, 0]
        yield share("threshold", f"{name}: right of those that clear it", int(right[clear].sum()), int(clear.sum()))
        yield share("threshold", f"{name}: clear it, of those right", int(clear[right].sum()), int(right.sum()))


def chosen(many: JudgedClips) -> Iterator[Figure]:
    """The best of 8 by prompt_match, and by all questions as they are weighed."""
    for name, scores, truth in ranked(many):
        part = "best of 8"
        yield resampled(part, f"{name}: mean of all, judge", lambda s: float(s.mean()), scores)
        yield resampled(part, f"{name}: mean of all, oracle", lambda t: float(t.mean()), truth)
        yield resampled(part, f"{name}: the judge's gain", lambda s, t: best_of(s, t, EACH).claimed, scores, truth)
        yield resampled(part, f"{name}: the oracle's gain", lambda s, t: best_of(s, t, EACH).true, scores, truth)
        yield resampled(part, f"{name}: AUROC within a prompt", within, scores, truth)
        most = best_of(truth, truth, EACH).true
        yield Figure(part, f"{name}: most that the oracle could gain", most, len(truth))
        yield resampled(part, f"{name}: oracle's by judge's", _ratio, scores, truth, target=GAIN)


def within(scores: np.ndarray, truth: np.ndarray) -> float:
    """The chance that of a prompt's samples a better one is given more than a worse one; both are [prompts, samples]."""
    better = truth[:, :, None] > truth[:, None, :]
    more = np.sign(scores[:, :, None] - scores[:, None, :]) / 2 + 0.5
    return float(more[better].mean()) if better.any() else float("nan")


def _ratio(scores: np.ndarray, truth: np.ndarray) -> float:
    gain = best_of(scores, truth, EACH)
    return gain.true / gain.claimed


def ranked(many: JudgedClips) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names, scores and the oracle's own, float [prompts, samples]."""
    weights = np.asarray([question.weight for question in QUESTIONS])
    marks = many.marks.astype(float)
    yield "prompt_match", many.p_yes[:, 0].reshape(-1, EACH).astype(float), marks[:, 0].reshape(-1, EACH)
    whole = [(each @ weights / weights.sum()).reshape(-1, EACH) for each in (many.p_yes.astype(float), marks)]
    yield "weighed", whole[0], whole[1]


def coverage(sources: list[JudgedClips]) -> Iterator[Figure]:
    """What the oracle sees in good clips and in none of them that the default thresholds keep."""
    part = "filtering"
    marks = np.concatenate([clips.marks for clips in sources])
    p_yes = np.concatenate([clips.p_yes for clips in sources])
    scenes = [scene for clips in sources for scene in clips.asked.scenes]
    good = np.flatnonzero(marks.all(axis=1))
    kept = (p_yes >= [question.threshold for question in QUESTIONS]).all(axis=1)
    yield share(part, "good by the oracle, of all", len(good), len(marks))
    yield share(part, "good, of those kept", int(marks[kept].all(axis=1).sum()), int(kept.sum()))
    yield share(part, "kept, of those good", int(kept[good].sum()), len(good))
    for name, parts in (("values", values), ("pairs", pairs)):
        found = lost([set(parts(scenes[at])) for at in good], kept[good])
        yield Figure(part, f"{name} lost", 100 * found.filtered, found.count, unit="%", target=LOSS, sense="at most")
        low, high = 100 * found.low, 100 * found.high
        yield Figure(part, f"{name} lost by chance", 100 * found.by_chance, found.count, low, high, "%")
        yield Figure(
            part,
            f"{name} lost beyond chance",
            100 * (found.filtered - found.by_chance),
            found.count,
            100 * found.filtered - high,
            100 * found.filtered - low,
            "%",
            LOSS,
            "at most",
        )
    shown = [set(values(scenes[at])) for at in good]
    rates = []
    for value in sorted(set().union(*shown)):
        rows = [at for at, each in zip(good, shown, strict=True) if value in each]
        rates.append(share(part, f"kept of good {value[0]}", int(kept[rows].sum()), len(rows)))
    yield from sorted(rates, key=lambda figure: figure.value or 0.0)[:4]


def sheet(*sources: JudgedClips) -> Any:
    """Where the judge errs most: wrong ones that it believes in, then right ones that it does not."""
    own = np.concatenate([clips.p_yes[:, 0] for clips in sources])
    right = np.concatenate([clips.marks[:, 0] for clips in sources])
    order = np.argsort(own)
    errs = [
        *[at for at in order[::-1] if not right[at]][: WORST // 2],
        *[at for at in order if right[at]][: WORST // 2],
    ]
    said = [prompt for clips in sources for prompt in clips.asked.prompts]
    texts = [f"{said[at]} [{own[at]:.2f}, {'right' if right[at] else 'WRONG'}]" for at in errs]
    return contact_sheet(np.concatenate([clips.clips for clips in sources])[errs], texts)


def plot(sources: dict[str, JudgedClips], many: JudgedClips, path: Path) -> None:
    """How often the oracle agrees at each P(yes), and gains of choosing among more and more samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    left.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for name, clips in sources.items():
        own, marks = clips.p_yes[:, 0], clips.marks[:, 0]
        if not marks.all():  # of renderings all are right
            means = [(own[part].mean(), marks[part].mean()) for part in bins(own)]
            left.plot(*zip(*means, strict=True), marker="o", markersize=3, linewidth=1, label=name)
    left.set(title="prompt_match, own prompts", xlabel="P(yes) of the judge", ylabel="share right by the oracle")
    left.legend(frameon=False, fontsize=8)
    counts = range(1, EACH + 1)
    for (name, scores, truth), colour in zip(ranked(many), ("#2563eb", "#b45309"), strict=True):
        gains = [best_of(scores, truth, count) for count in counts]
        right.plot(counts, [gain.claimed for gain in gains], "--", color=colour, label=f"{name}: judge")
        right.plot(
            counts, [gain.true for gain in gains], color=colour, marker="o", markersize=3, label=f"{name}: oracle"
        )
    right.set(title="gain of the best by the judge", xlabel="samples to choose from", ylabel="above the mean")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


_started = time.monotonic()


def _say(text: str) -> None:
    print(f"{time.monotonic() - _started:6.0f} s  {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="clips of each source")
    parser.add_argument("--prompts", type=int, default=32, help="of which the best of 8 samples is chosen")
    parser.add_argument("--model", type=Path, help="another judge: a folder")
    parser.add_argument("--keep", type=Path, help="keep clips and answers in this folder, and take what is there")
    parser.add_argument("--plot", type=output_file, help="draw reliability and gains into this PNG")
    parser.add_argument("--sheet", type=output_file, help="write clips where the judge errs most to this PNG")
    parser.add_argument("--seed", type=int, default=0, help="other prompts and noise")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
