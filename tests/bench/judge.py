"""What judging and captioning cost where a clip is read once, beside one `generate` a question over the whole conversation.

    ditmill bench judge [--clips 64] [--batch 16] [--model FOLDER] [--seed 0]

Eight questions (the default rubric's three, and five about single attributes) and two captions, of rendered clips of the
shapes world, to the pack's judge. The baseline is a practitioner's loop: the same model, batches, frames, greedy
decoding and limits on tokens. One thread, CPU-seconds; preparing images and text is apart from the model's own work.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack.grammar import sample_scenes
from models.pack.phrases import describe
from models.pack.train.loop import stream
from models.pack.train.questions import attribute
from models.pack.world import render
from models.source import resolve
from pipelines.viewers import Caption, Judge
from stages.caption import INSTRUCTIONS
from stages.rubric import load_rubric
from tests.bench.support import plain_loop

T = TypeVar("T")

OTHERS = 5
LESS = 4.0
"""Times fewer CPU-seconds in the model while it judges."""


def main() -> None:
    import torch

    torch.set_num_threads(1)
    options = _arguments()
    model = Multimodal(MultimodalRef(str(options.model) if options.model else resolve("pack://shapes", "judge")))
    frames, questions = _asked(options.clips, options.seed)
    shown = evenly_spaced(frames, Judge().num_frames)
    settings = Caption()
    instructions = [INSTRUCTIONS[style].format(media="video") for style in settings.styles]
    batches = [slice(start, start + options.batch) for start in range(0, options.clips, options.batch)]

    def ours_judges() -> np.ndarray:
        return np.concatenate([model.p_yes(shown[part], questions[part]) for part in batches])

    def ours_captions() -> list[list[str]]:
        return [row for part in batches for row in model.caption(shown[part], instructions, settings.max_new_tokens)]

    def plainly_judges() -> np.ndarray:
        answers = []
        for part in batches:
            asked = [[{"prompt": row[at]} for row in questions[part]] for at in range(len(questions[0]))]
            columns = [plain_loop.ask(model.processor, model.model, shown[part], each, "{prompt}") for each in asked]
            answers.append(np.stack(columns, axis=1))
        return np.concatenate(answers)

    def plainly_captions() -> list[list[str]]:
        said = []
        for part in batches:
            styles = [
                plain_loop.caption(model.processor, model.model, shown[part], text, settings.max_new_tokens)
                for text in instructions
            ]
            said += [list(row) for row in zip(*styles, strict=True)]
        return said

    clock = Clock(model.model)
    with torch.inference_mode():
        plain_loop.caption(model.processor, model.model, shown[:1], instructions[0], 2)  # both have run once
        plain, plain_p = clock.measure(plainly_judges)
        plain_said, plain_texts = clock.measure(plainly_captions)
    model.caption(frames[:1, :1], instructions[:1], 2)
    ours, our_p = clock.measure(ours_judges)
    ours_said, our_texts = clock.measure(ours_captions)
    same = sum(ours == theirs for ours, theirs in zip(our_texts, plain_texts, strict=True))
    each = f"{options.clips} clips, {len(questions[0])} questions and {len(instructions)} captions of each"
    print(f"{each}, in batches of {options.batch}, CPU-seconds")
    print(f"{'':24}{'plain loop':>12}{'read once':>12}{'times less':>12}")
    for name, before, after in (
        ("judging, in the model", plain.model, ours.model),
        ("judging, all", plain.all, ours.all),
        ("captioning, all", plain_said.all, ours_said.all),
        ("both", plain.all + plain_said.all, ours.all + ours_said.all),
    ):
        print(f"{name:24}{before:12.2f}{after:12.2f}{before / after:12.1f}")
    gone = plain.model / ours.model
    verdict = "met" if gone >= LESS else "MISSED"
    print(f"target: {LESS:g} times less in the model while it judges: {verdict}")
    print(f"largest difference of a probability: {np.abs(plain_p - our_p).max():.1e}")
    print(f"clips whose captions are alike: {same} of {len(our_texts)}")


class Spent(NamedTuple):
    """CPU-seconds, and those of them in the model."""

    all: float
    model: float


class Clock:
    """Measures calls that use a model."""

    def __init__(self, model: Any) -> None:
        self._spent, self._inside = 0.0, False
        model.generate = self._timed(model.generate)
        model.forward = self._timed(model.forward)
        model.base_model.forward = self._timed(model.base_model.forward)

    def measure(self, call: Callable[[], T]) -> tuple[Spent, T]:
        self._spent, began = 0.0, time.process_time()
        found = call()
        return Spent(time.process_time() - began, self._spent), found

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if self._inside:  # `generate` calls `forward`
                return call(*arguments, **keywords)
            self._inside, began = True, time.process_time()
            try:
                return call(*arguments, **keywords)
            finally:
                self._inside = False
                self._spent += time.process_time() - began

        return timed


def _asked(count: int, seed: int) -> tuple[np.ndarray, list[list[str]]]:
    """Clips uint8 [count, T, H, W, 3], and eight questions about each."""
    rng = stream(seed, 6_500_000)
    scenes = sample_scenes(rng, count)
    frames = render(scenes, range(count))
    questions = load_rubric("default").questions
    asked = []
    for scene in scenes:
        prompt = describe(scene, rng)
        parts = [attribute(scene, rng, image=False) for _ in range(OTHERS)]
        asked.append(
            [each.format(prompt, frames.shape[1]) for each in questions] + [part.head + part.text for part in parts]
        )
    return frames, asked


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--model", type=Path, help="another multimodal checkpoint: a folder")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
