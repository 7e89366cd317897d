"""What the verifier of captions costs, and what is true of the statements that it leaves (stages/caption.py).

    ditmill bench captions [--clips 128] [--verify 0.3 0.5 0.7] [--model FOLDER] [--seed 0]

Dense captions of held-out scenes of the shapes world, as rendered and with spoilt pixels, of those that the oracle reads in
full; a statement is right if the oracle reads all that it says. The baseline is the captioner alone. What the verifier makes
of statements that are known to be right or wrong is apart: each scene, and one that differs from it in one place. One thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import structlog

from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
from models.pack.grammar import is_complete
from models.pack.oracle import match
from models.pack.phrases import describe, parse
from models.pack.train.intervals import wilson
from models.pack.train.judge_exam import Exam, exams
from models.pack.train.loop import stream
from models.pack.train.questions import Seen, changed
from models.source import resolve
from stages.batch import texts
from stages.caption import VERIFY, CaptionMedia, statements

BATCH = 16
STYLE = "dense"


class Measured(NamedTuple):
    """Statements that are right and all there are, clips that have a caption, CPU-seconds."""

    right: int
    all: int
    captioned: int
    seconds: float


def main() -> None:
    import torch

    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    options = _arguments()
    ref = MultimodalRef(str(options.model) if options.model else resolve("pack://shapes", "judge"))
    for kind, whole in exams(Path(os.devnull), options.clips, options.seed).items():
        clear = [at for at, seen in enumerate(whole.seen) if seen.reading.scene and is_complete(seen.reading.scene)]
        exam = Exam(whole.frames[clear], [whole.seen[at] for at in clear])
        print(f"{kind}: {len(clear)} of {options.clips} held-out clips, those that the oracle reads in full")
        print(f"{'verify':>10}{'statements right':>26}{'statements':>12}{'clips captioned':>17}{'CPU-s':>8}")
        plain = _measure(ref, exam, 0.0)
        _print("nothing", plain, plain)
        for verify in options.verify:
            _print(f"{verify:g}", _measure(ref, exam, verify), plain)
        _known(ref, exam, options.verify, options.seed)


def _measure(ref: MultimodalRef, exam: Exam, verify: float) -> Measured:
    load_multimodal.cache_clear()  # and with it what has been read of the clips
    stage = CaptionMedia(ref, (STYLE,), verify=verify)
    stage.load()
    began = time.process_time()
    said: list[str] = []
    for start in range(0, len(exam.frames), BATCH):
        frames = exam.frames[start : start + BATCH]
        said += stage({"frames": frames, "prompt": texts([""] * len(frames))})["caption"].tolist()
    seconds = time.process_time() - began
    marks = [
        _is_right(one, seen) for text, seen in zip(said, exam.seen, strict=True) for one in statements(STYLE, text)
    ]
    return Measured(sum(marks), len(marks), sum(map(bool, said)), seconds)


def _is_right(statement: str, seen: Seen) -> bool:
    said = parse(statement)
    return said is not None and all(match(seen.reading, said).values())


def _known(ref: MultimodalRef, exam: Exam, bars: list[float], seed: int) -> None:
    """Print how many right statements and how many wrong ones the verifier leaves."""
    rng = stream(seed, 9_100_000)
    pairs = []
    for seen in exam.seen:
        assert seen.reading.scene is not None
        other = changed(seen.reading.scene, rng)
        while all(match(seen.reading, other).values()):
            other = changed(seen.reading.scene, rng)
        pairs.append([VERIFY.format(media="video", statement=describe(scene)) for scene in (seen.reading.scene, other)])
    p_yes = load_multimodal(ref).p_yes(evenly_spaced(exam.frames, CaptionMedia(ref).num_frames), pairs)
    for bar in bars:
        right, wrong = (_share(int((column >= bar).sum()), len(column)) for column in p_yes.T)
        print(f"at {bar:g} it leaves {right} % of what is right, {wrong} % of what is wrong in one place")
    means = json.dumps([round(float(mean), 3) for mean in p_yes.mean(axis=0)])
    print(f"mean P(yes) of right and wrong: {means}\n", flush=True)


def _print(verify: str, found: Measured, plain: Measured) -> None:
    share = f"{found.all / plain.all:.0%}"
    seconds = f"{found.seconds:>8.1f} ({found.seconds / plain.seconds:.2f}x)"
    print(f"{verify:>10}{_share(found.right, found.all):>26}{share:>12}{found.captioned:>17}{seconds}", flush=True)


def _share(count: int, total: int) -> str:
    low, high = wilson(count, total)
    return f"{100 * count / max(1, total):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--verify", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--model", type=Path, help="another multimodal checkpoint: a folder")
    parser.add_argument("--seed", type=int, default=0, help="other scenes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
