"""What leaving out vision tokens that a frame shows again costs the judge and the captioner (models/token_drop.py).

    ditmill bench tokens [--clips 256] [--thresholds 0.002 0.01 0.03] [--model FOLDER] [--seed 0]

Held-out scenes of the shapes world, as rendered and with spoilt pixels, asked about as in models.pack.train.judge_exam; right
is what the oracle says. The baseline reads every token. One thread.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack.train.judge_exam import Exam, exams, marked
from models.source import resolve
from models.token_drop import read_tokens

FRAMES = 8
"""Shown of each clip; showing half as many is the other way to read half of the tokens."""

HALF, POINTS = 0.5, 1.0
"""To reach: most of the tokens that are read, and most points of AUROC that it costs."""


def main() -> None:
    import torch

    torch.set_num_threads(1)
    options = _arguments()
    ref = MultimodalRef(str(options.model) if options.model else resolve("pack://shapes", "judge"))
    asked = exams(Path(os.devnull), options.clips, options.seed)
    per_frame = Multimodal(ref).processor.image_seq_len
    for kind, exam in asked.items():
        print(f"{kind}, {options.clips} held-out clips, {FRAMES} frames of {per_frame} vision tokens")
        print(f"{'dropped':>14}{'read':>7}{'CPU-s':>8}{'AUROC of prompt_match':>26}{'captions all right':>24}")
        shown = evenly_spaced(exam.frames, FRAMES)
        plain = _measure(Multimodal(ref), exam)
        _print("nothing", 1.0, plain)
        fewer = Exam(evenly_spaced(exam.frames, FRAMES // 2), exam.seen)
        _print("half of frames", 0.5, _measure(Multimodal(ref), fewer))
        met = False
        for threshold in options.thresholds:
            read = float(np.mean([read_tokens(clip, per_frame, threshold) for clip in shown]))
            found = _measure(Multimodal(replace(ref, token_drop=threshold)), exam)
            _print(f"below {threshold:g}", read, found)
            met = met or (read <= HALF and plain.auroc[0] - found.auroc[0] <= POINTS / 100)
        print(f"half of the tokens at no more than {POINTS:g} point of AUROC: {'met' if met else 'MISSED'}\n")


class Measured(NamedTuple):
    """CPU-seconds, and two figures with their intervals."""

    seconds: float
    auroc: tuple[float, ...]
    captions: tuple[float, ...]


def _measure(judge: Multimodal, exam: Exam) -> Measured:
    began = time.process_time()
    found = marked(judge, exam)
    return Measured(time.process_time() - began, found["prompt_match"]["auroc"], found["captions"]["all"][:3])


def _print(dropped: str, read: float, found: Measured) -> None:
    figures = f"{_interval(found.auroc):>26}{_interval(found.captions):>24}"
    print(f"{dropped:>14}{read:>7.0%}{found.seconds:>8.1f}{figures}", flush=True)


def _interval(figure: tuple[float, ...]) -> str:
    return f"{100 * figure[0]:.1f} [{100 * figure[1]:.1f}, {100 * figure[2]:.1f}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.002, 0.01, 0.03])
    parser.add_argument("--model", type=Path, help="another multimodal checkpoint: a folder")
    parser.add_argument("--seed", type=int, default=0, help="other scenes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
