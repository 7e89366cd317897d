"""What a screen before the judge saves and costs, and whether thresholds found for a precision have it.

    ditmill bench cascade [--clips 512] [--screen-frames 4] [--questions prompt_match] [--seed 0]

Held-out scenes of the shapes world, a third of them with spoilt pixels, each with its own description or, every other one,
with one of another scene. Good is what the oracle accepts. The screen is the pack's judge on fewer frames and questions,
because the pack has one judge; the baseline is the judge alone on eight frames. One thread, CPU-seconds.

Then half of the clips serve as labels: the threshold on `overall` that they give for each precision is held to the other
half, beside the rubric's own thresholds.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from models.multimodal import MultimodalRef, load_multimodal
from models.pack.phrases import describe
from models.pack.train.intervals import wilson
from models.pack.train.judge_exam import exams
from models.pack.train.loop import stream
from models.pack.train.questions import described
from models.source import resolve
from pipelines.operating_point import by_precision
from stages.actor import run_stage
from stages.batch import Batch, Stage, load_json, take, texts
from stages.judge import JudgeQuality
from stages.rubric import load_rubric
from stages.screen import ScreenQuality

BATCH = 16
BANDS: tuple[tuple[float, float | None], ...] = ((0.1, None), (0.3, None), (0.1, 0.9), (0.3, 0.9), (0.3, 0.7))
"""reject and accept of the screens."""
PRECISIONS = (0.8, 0.85, 0.9, 0.98)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    options = _arguments()
    batches = _batches(options.clips, options.seed)
    rubric = load_rubric("default")
    ref = MultimodalRef(str(options.model) if options.model else resolve("pack://shapes", "judge"))
    judge = JudgeQuality(rubric, ref)
    screen = ScreenQuality(rubric.only(options.questions), ref, num_frames=options.screen_frames)
    good = np.concatenate([run_stage(JudgeQuality(rubric, backend="oracle"), each)[0]["verdict"] for each in batches])
    good = good == "accepted"
    for stage in (judge, screen):
        run_stage(stage, batches[0])  # both have run once
    shown = f"the screen sees {options.screen_frames} frames and is asked {', '.join(options.questions)}"
    print(f"{len(good)} clips, {good.mean():.0%} of them good; {shown}")
    print(f"{'':26}{'CPU-s':>8}{'share':>8}{'judged':>8}{'precision':>22}{'recall':>22}{'as the judge':>14}")
    alone, seconds, scores = _through((judge,), batches)
    _print("judge alone", seconds, seconds, scores, alone, good, alone)
    for reject, accept in BANDS:
        tier = replace(screen, reject=reject, accept=accept)
        found, cost, asked = _through((tier, replace(judge, screen=tier)), batches)
        _print(f"{reject:g} to {'-' if accept is None else f'{accept:g}'}", cost, seconds, asked, found, good, alone)
    overall = np.array([rubric.overall(row) for row in scores])
    labels, rest = np.arange(len(good)) % 4 < 2, np.arange(len(good)) % 4 >= 2
    print(f"\nthresholds on `overall` from {labels.sum()} labels, held to {rest.sum()} other clips")
    print(f"{'':26}{'threshold':>10}{'told':>22}{'found':>22}{'recall':>22}")
    _print_rest("the rubric's own", "", "", alone[rest], good[rest])
    for precision in PRECISIONS:
        point = by_precision("overall", "", overall[labels], good[labels], precision)
        if point is None or point.precision is None or point.low is None or point.high is None:
            print(f"{f'precision {precision:g}':26}{'out of reach':>10}")
            continue
        told = f"{point.precision:.3f} [{point.low:.3f}, {point.high:.3f}]"
        _print_rest(
            f"precision {precision:g}", f"{point.threshold:.3f}", told, overall[rest] >= point.threshold, good[rest]
        )


def _through(stages: tuple[Stage, ...], batches: list[Batch]) -> tuple[np.ndarray, float, list[dict[str, float]]]:
    """Which clips were accepted, bool [n], the CPU-seconds that it took, and their scores."""
    load_multimodal.cache_clear()  # and with it what has been read of the clips
    for stage in stages:
        stage.load()
    accepted, scores = [], []
    began = time.process_time()
    for batch in batches:
        for stage in stages:
            batch, _ = run_stage(stage, batch)
        accepted.append(batch["verdict"] == "accepted")
        scores += [{item["name"]: item["value"] for item in row} for row in load_json(batch["scores"])]
    return np.concatenate(accepted), time.process_time() - began, scores


def _print(
    name: str,
    seconds: float,
    alone: float,
    scores: list[dict[str, float]],
    accepted: np.ndarray,
    good: np.ndarray,
    judged: np.ndarray,
) -> None:
    share = np.mean(["prompt_match" in row for row in scores])
    figures = f"{_share(accepted & good, accepted):>22}{_share(accepted & good, good):>22}"
    print(
        f"{name:26}{seconds:>8.1f}{seconds / alone:>8.2f}{share:>8.0%}{figures}{(accepted == judged).mean():>14.1%}",
        flush=True,
    )


def _print_rest(name: str, threshold: str, told: str, accepted: np.ndarray, good: np.ndarray) -> None:
    figures = f"{_share(accepted & good, accepted):>22}{_share(accepted & good, good):>22}"
    print(f"{name:26}{threshold:>10}{told:>22}{figures}")


def _share(part: np.ndarray, whole: np.ndarray) -> str:
    right, count = int(part.sum()), int(whole.sum())
    if not count:
        return "-"
    low, high = wilson(right, count)
    return f"{right / count:.3f} [{low:.3f}, {high:.3f}]"


def _batches(clips: int, seed: int) -> list[Batch]:
    """Clips and what they were asked for."""
    found = exams(Path(os.devnull), clips, seed)
    rng = stream(seed, 8_500_000)
    spoilt = np.arange(clips) % 3 == 0
    frames = np.where(spoilt[:, None, None, None, None], found["spoilt"].frames, found["rendered"].frames)
    prompts = [
        describe(seen.scene if at % 2 else described(seen.scene, rng, image=False), rng)
        for at, seen in enumerate(found["rendered"].seen)
    ]
    empty = {
        name: texts([""] * clips) for name in ("scores", "verdict", "reasons", "error", "error_type", "error_stage")
    }
    batch = {"sample_id": texts([str(at) for at in range(clips)]), "prompt": texts(prompts), "frames": frames, **empty}
    return [take(batch, np.arange(start, min(start + BATCH, clips))) for start in range(0, clips, BATCH)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--screen-frames", type=int, default=4, help="frames that the screen is shown")
    parser.add_argument("--questions", nargs="+", default=["prompt_match"], help="what the screen is asked")
    parser.add_argument("--model", type=Path, help="another multimodal checkpoint: a folder")
    parser.add_argument("--seed", type=int, default=0, help="other scenes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
