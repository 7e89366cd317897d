"""Clips of the shapes world from several generators, what the judge answers about them, and what the oracle says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.loading import GeneratorRef
from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
from models.pack.grammar import KINDS, Kind, Scene, sample_scenes
from models.pack.marks import is_clean, is_smooth, matches
from models.pack.oracle import Reading, read
from models.pack.phrases import describe
from models.pack.train.flaws import spoilt
from models.pack.train.loop import stream
from models.pack.world import NUM_FRAMES, render
from models.plan import SamplerPlan
from models.source import content_sha256, resolve
from pipelines.viewers import Judge
from stages.rubric import load_rubric
from tests.bench.support.pack_parts import Asked, Progress, altered, make

Split = Literal["train", "held_out", "all"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "all")
BATCH = 16
QUESTIONS = load_rubric("default").questions
"""prompt_match, no_artefacts and motion_smooth, in this order."""
PLACE = 6_600_000


@dataclass(frozen=True)
class JudgedClips:
    """Clips uint8 [n, T, H, W, 3] of scenes, each asked about with its own prompt and one that differs in one attribute.

    p_yes: float32 [n, 3], of `QUESTIONS` with its own prompt. altered_p_yes: float32 [n], of prompt_match with the other.
    """

    asked: Asked
    others: tuple[Scene, ...]
    clips: np.ndarray
    readings: tuple[Reading, ...]
    p_yes: np.ndarray
    altered_p_yes: np.ndarray

    @cached_property
    def marks(self) -> np.ndarray:
        """What the oracle answers to `QUESTIONS`: bool [n, 3]."""
        rows = [
            [matches(reading, scene), is_clean(clip, reading), is_smooth(clip, reading)]
            for clip, reading, scene in zip(self.clips, self.readings, self.asked.scenes, strict=True)
        ]
        return np.asarray(rows)

    @cached_property
    def altered_match(self) -> np.ndarray:
        """Whether the oracle sees the altered scene: bool [n]."""
        return np.asarray([matches(reading, scene) for reading, scene in zip(self.readings, self.others, strict=True)])


@dataclass(frozen=True)
class Bench:
    """The judge, the generator and where clips and answers are kept for the next time, if anywhere."""

    seed: int
    keep: Path | None
    say: Progress
    model: Path | None = None

    def generated(self, plan: SamplerPlan, asked: Asked, model: str = "pack://shapes") -> JudgedClips:
        """Through the stages of a run; see `pack_parts.make`."""
        path = resolve(model, "generator")
        batches = []
        for start in range(0, len(asked.prompts), BATCH):
            part = slice(start, start + BATCH)
            some = Asked(asked.scenes[part], asked.prompts[part], asked.num_frames, asked.indices[part])
            key = ("clips", _content(path), plan.plan_id, self.seed, some.prompts, some.indices, some.num_frames)
            batches.append(
                self._kept(key, lambda some=some: make(GeneratorRef(path), plan, some, BATCH, self.seed, self.say)[0])
            )
            self.say(f"{plan.plan_id[:6]}: clip {start + len(some.prompts)} of {len(asked.prompts)}")
        return self._judged(asked, np.concatenate(batches))

    def rendered(self, asked: Asked) -> JudgedClips:
        return self._judged(asked, self._render(asked))

    def spoilt(self, asked: Asked) -> JudgedClips:
        """Each with a flaw of `models.pack.train.flaws`."""
        clips = self._render(asked)
        rngs = [stream(self.seed, PLACE + 5, at) for at in range(len(clips))]
        return self._judged(asked, np.stack([spoilt(clip, clips[at - 1], rngs[at]) for at, clip in enumerate(clips)]))

    def _render(self, asked: Asked) -> np.ndarray:
        return render(asked.scenes, [int(self.seed * 1_000_003 + at) for at in range(len(asked.scenes))])

    def _judged(self, asked: Asked, clips: np.ndarray) -> JudgedClips:
        others = tuple(altered(scene, stream(self.seed, PLACE + 4, at)) for at, scene in enumerate(asked.scenes))
        questions = []
        for at, (prompt, other) in enumerate(zip(asked.prompts, others, strict=True)):
            texts = (prompt, prompt, prompt, describe(other, stream(self.seed, PLACE + 6, at)))
            about = (*QUESTIONS, QUESTIONS[0])
            questions.append([each.format(text, asked.num_frames) for each, text in zip(about, texts, strict=True)])
        path = str(self.model) if self.model else resolve("pack://shapes", "judge")
        shown = evenly_spaced(clips, Judge().num_frames)
        answers = []
        for start in range(0, len(shown), BATCH):
            part = slice(start, start + BATCH)
            key = ("answers", _content(path), _digest(shown[part].tobytes()), questions[part])
            answers.append(
                self._kept(
                    key, lambda part=part: load_multimodal(MultimodalRef(path)).p_yes(shown[part], questions[part])
                )
            )
            self.say(f"judged {min(part.stop, len(shown))} of {len(shown)}")
        found = np.concatenate(answers)
        return JudgedClips(asked, others, clips, tuple(map(read, clips)), found[:, :3], found[:, 3])

    def _kept(self, key: tuple[Any, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        if self.keep is None:
            return make()
        path = self.keep / f"{_digest(json.dumps(key).encode())}.npy"
        if not path.exists():
            self.keep.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".part.npy")
            np.save(beside, make())
            beside.replace(path)
        return np.load(path)


def prompts(count: int, seed: int, split: Split, *, kinds: tuple[Kind, ...] = KINDS, each: int = 1) -> Asked:
    """`each` samples of `count` prompts, one after another. More prompts begin with the same ones."""
    place = SPLITS.index(split)
    scenes = sample_scenes(stream(seed, PLACE, place), count, kinds=kinds, split=split)
    said = [describe(scene, stream(seed, PLACE + 1, place, at)) for at, scene in enumerate(scenes)]
    rows = [at for at in range(count) for _ in range(each)]
    return Asked(
        tuple(scenes[at] for at in rows), tuple(said[at] for at in rows), NUM_FRAMES, tuple(range(each)) * count
    )


_content = cache(content_sha256)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
