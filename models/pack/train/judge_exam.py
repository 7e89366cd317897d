"""Measure the pack's judge against the oracle, on held-out scenes: as rendered, with spoilt pixels, and out of the VAE.

    python -m models.pack.train.judge_exam [--clips 256]

It goes the way of a run: `models.multimodal`, the rubric's questions, the captioner's instructions. Each clip is asked about
what was rendered and about something else; right is what `oracle.match` says of the clip as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack.grammar import is_complete, keeps, sample_scenes
from models.pack.phrases import describe, parse
from models.pack.train.flaws import Decoded, spoilt
from models.pack.train.intervals import bootstrap, wilson
from models.pack.train.loop import stream
from models.pack.train.questions import (
    HEAD,
    MOTION_SMOOTH,
    NO_ARTEFACTS,
    SHORT,
    TAIL,
    Seen,
    about,
    as_rendered,
    described,
    seen_as,
)
from models.pack.world import render

BINS = 10
CAPTION_TOKENS = 48


@dataclass(frozen=True)
class Exam:
    """Clips, what the oracle says of them, and the descriptions that are asked about."""

    frames: np.ndarray
    seen: list[Seen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/pack"))
    parser.add_argument("--clips", type=int, default=256)
    options = parser.parse_args()
    print(json.dumps(measure(options.folder / "judge", options.folder / "decoded-held_out", options.clips), indent=1))


def measure(checkpoint: Path, decoded: Path, clips: int = 256) -> dict[str, Any]:
    """Figures on each kind of clips, with 95% intervals, and CPU-seconds a clip."""
    judge = Multimodal(MultimodalRef(str(checkpoint)))
    return {kind: marked(judge, exam) for kind, exam in exams(decoded, clips).items()}


def exams(decoded: Path, clips: int, seed: int = 0) -> dict[str, Exam]:
    rng = stream(seed, 8_000_000)
    scenes = sample_scenes(rng, clips, split="held_out")
    plain = render(scenes, [int(seed) for seed in rng.integers(1 << 62, size=clips)])
    broken = np.stack([spoilt(clip, plain[at - 1], rng) for at, clip in enumerate(plain)])
    found = {
        "rendered": Exam(plain, [as_rendered(scene) for scene in scenes]),
        "spoilt": Exam(broken, [seen_as(clip, scene) for clip, scene in zip(broken, scenes, strict=True)]),
    }
    out_of_vae = Decoded(decoded)
    if out_of_vae.frames:
        found["decoded"] = Exam(np.stack(out_of_vae.frames[:clips]), out_of_vae.seen[:clips])
    return found


def marked(judge: Multimodal, exam: Exam) -> dict[str, Any]:
    rng = stream(1, 8_000_000)
    head = HEAD.format(media="video")
    asked = [
        [
            about(seen.reading, seen.scene, rng, head, TAIL),
            about(seen.reading, described(seen.scene, rng, image=False), rng, head, TAIL),
        ]
        for seen in exam.seen
    ]
    shown = evenly_spaced(exam.frames, 8)
    start = time.process_time()
    fixed = [NO_ARTEFACTS.format(media="video"), MOTION_SMOOTH]
    p_yes = judge.p_yes(shown, [[one.head + one.text for one in each] + fixed for each in asked])
    seconds = (time.process_time() - start) / len(shown)
    match = np.asarray([[one.answer == "Yes" for one in each] for each in asked]).reshape(-1)
    found = {
        "prompt_match": figures(p_yes[:, :2].reshape(-1), match),
        "no_artefacts": figures(p_yes[:, 2], np.asarray([seen.clean for seen in exam.seen])),
        "motion_smooth": figures(p_yes[:, 3], np.asarray([seen.smooth for seen in exam.seen])),
    }
    start = time.process_time()
    complete = [at for at, seen in enumerate(exam.seen) if seen.reading.scene and is_complete(seen.reading.scene)]
    captions = [texts[0] for texts in judge.caption(shown[complete], [SHORT.format(media="video")], CAPTION_TOKENS)]
    captioning = (time.process_time() - start) / max(1, len(complete))
    return {
        **found,
        "captions": captioned(captions, [exam.seen[at] for at in complete]),
        "cpu_seconds": {"four_questions": seconds, "caption": captioning},
        "examples": [
            (text, describe(exam.seen[at].scene)) for text, at in zip(captions[:4], complete[:4], strict=True)
        ],
    }


def figures(p_yes: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """AUROC, expected calibration error and accuracy at 0.5; NaN where all answers are the same."""
    made: dict[str, Any] = {"n": len(right), "yes": float(right.mean())}
    measures: dict[str, Callable[..., float]] = {"auroc": auroc, "ece": ece, "accuracy": accuracy}
    for name, figure in measures.items():
        made[name] = (figure(p_yes, right), *bootstrap(figure, p_yes, right, draws=300))
    return made


def auroc(p_yes: np.ndarray, right: np.ndarray) -> float:
    """The chance that a right one is given more than a wrong one."""
    from scipy.stats import rankdata

    good = int(right.sum())
    if good in (0, len(right)):
        return float("nan")
    return float((rankdata(p_yes)[right].sum() - good * (good + 1) / 2) / (good * (len(right) - good)))


def ece(p_yes: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: |P(yes) - share of yes| in bins of equal width, weighed by what is in them."""
    bins = np.minimum((p_yes * BINS).astype(int), BINS - 1)
    off = [abs(p_yes[bins == at].sum() - right[bins == at].sum()) for at in range(BINS)]
    return float(sum(off) / len(right))


def accuracy(p_yes: np.ndarray, right: np.ndarray) -> float:
    return float(((p_yes >= 0.5) == right).mean())


def captioned(captions: list[str], seen: list[Seen]) -> dict[str, Any]:
    """How many captions say all that the oracle reads off the clip, figures in any order."""
    right = {"all": 0, "one": 0, "two": 0, "cut": 0}
    count = dict.fromkeys(right, 0)
    for text, clip in zip(captions, seen, strict=True):
        scene, said = clip.reading.scene, parse(text)
        assert scene is not None
        good = said is not None and keeps(said, scene)
        for name in ("all", scene.kind):
            right[name] += good
            count[name] += 1
    return {
        name: (right[name] / count[name], *wilson(right[name], count[name]), count[name])
        for name in right
        if count[name]
    }


if __name__ == "__main__":
    main()
