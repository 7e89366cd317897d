"""What each part of a pack is measured by: its models loaded by the code of a run, its clips read by the oracle."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from models.loading import GeneratorRef
from models.noise import noise_key
from models.pack.grammar import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MOTIONS,
    RESIZED,
    SHAPES,
    SIZES,
    Kind,
    Scene,
    Shot,
    flaw,
    is_complete,
    sample_scenes,
)
from models.pack.oracle import Reading, match, read
from models.pack.phrases import describe, parse
from models.pack.train.loop import stream
from models.pack.world import FPS, FRAME, NUM_FRAMES, render
from models.plan import SamplerPlan
from pipelines.identity import Shape, prompt_id
from stages.batch import Batch, texts
from stages.decode import DecodeLatents
from stages.early import BELOW, EarlyReject
from stages.encode import EncodeText
from stages.sample import SampleLatents

Progress = Callable[[str], None]

VALUES: dict[str, tuple[Any, ...]] = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "motion": MOTIONS}


@dataclass(frozen=True)
class Asked:
    """Scenes with a prompt for each, `num_frames` of them to be seen; `indices` number the samples of a prompt, all 0 if
    left out."""

    scenes: tuple[Scene, ...]
    prompts: tuple[str, ...]
    num_frames: int
    indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generated:
    """Clips uint8 [n, T, H, W, 3] of prompts, how each reads, and what a clip cost on one thread in CPU-seconds."""

    asked: Asked
    clips: np.ndarray
    readings: tuple[Reading, ...]
    seconds: dict[str, float]

    @cached_property
    def right(self) -> list[dict[str, bool]]:
        """What the oracle says of each clip, attribute by attribute."""
        return [match(reading, scene) for reading, scene in zip(self.readings, self.asked.scenes, strict=True)]


def held_out(count: int, seed: int, *, kinds: Sequence[Kind] = KINDS, image: bool = False) -> Asked:
    """Prompts that training never showed, their kinds in turn, each in one of the grammar's phrasings."""
    rng = stream(seed, 6_000_000, int(image))
    scenes = sample_scenes(rng, count, kinds=kinds, split="held_out", image=image)
    return Asked(tuple(scenes), tuple(describe(scene, rng) for scene in scenes), 1 if image else NUM_FRAMES)


def generate(
    ref: GeneratorRef, plan: SamplerPlan, asked: Asked, batch_size: int, seed: int, say: Progress
) -> Generated:
    """Through the stages of a run, from the noise that a run with this seed gives these prompts, and read by the oracle."""
    made, means = make(ref, plan, asked, batch_size, seed, say)
    return Generated(asked, made, tuple(map(read, made)), means)


def make(
    ref: GeneratorRef, plan: SamplerPlan, asked: Asked, batch_size: int, seed: int, say: Progress
) -> tuple[np.ndarray, dict[str, float]]:
    """The frames, and the CPU-seconds of each stage for a sample."""
    seconds: dict[str, list[float]] = {}
    clips = [batch["frames"] for batch in batches(ref, plan, asked, batch_size, seed, say, seconds)]
    return np.concatenate(clips), {name: mean_after_first(times) for name, times in seconds.items()}


def mean_after_first(times: Sequence[float]) -> float:
    """The first batch also pays for what happens once."""
    return float(np.mean(times[1:] or times))


def batches(
    ref: GeneratorRef,
    plan: SamplerPlan,
    asked: Asked,
    batch_size: int,
    seed: int,
    say: Progress,
    seconds: dict[str, list[float]],
    early: EarlyReject | None = None,
    below: float = -math.inf,
) -> Iterator[Batch]:
    """Batch after batch as the last stage leaves it; to `seconds`, of each stage, go its CPU-seconds for a sample.

    With `early`, samples that it scores `below` are stopped.
    """
    settings = ((ref,), plan, batch_size, 1)
    stages = (EncodeText(*settings), SampleLatents(*settings, early=early), DecodeLatents(*settings))
    for stage in stages:
        stage.load()
    indices = asked.indices or (0,) * len(asked.prompts)
    for start in range(0, len(asked.prompts), batch_size):
        part = slice(start, start + batch_size)
        prompts = asked.prompts[part]
        batch = _batch(list(prompts), indices[part], asked.num_frames, seed)
        batch[BELOW] = np.full(len(prompts), below)
        for stage in stages:
            began = time.process_time()
            batch = stage(batch)
            seconds.setdefault(stage.name, []).append((time.process_time() - began) / batch_size)
        yield batch
        each = sum(times[-1] for times in seconds.values())
        say(f"generated {start + len(prompts)} of {len(asked.prompts)}, {each:.2f} CPU-seconds each")


def _batch(prompts: list[str], indices: Sequence[int], num_frames: int, seed: int) -> Batch:
    count = len(prompts)
    shape = Shape(FRAME, FRAME, num_frames, float(FPS))
    blank = {name: texts([""] * count) for name in ("negative_prompt", "inputs", "extra", "error_type", "error")}
    sizes = {"height": FRAME, "width": FRAME, "num_frames": num_frames, "generator": 0}
    ids = [prompt_id(prompt, shape=shape, seed=seed) for prompt in prompts]
    keys = [noise_key(seed, each, index) for each, index in zip(ids, indices, strict=True)]
    return {
        **blank,
        **{name: np.full(count, value, np.int64) for name, value in sizes.items()},
        "fps": np.full(count, float(FPS)),
        "prompt": texts(prompts),
        "noise_key": texts(keys),
        "sample_id": texts(keys),
    }


def reconstruct(folder: Path, count: int, seed: int, say: Progress) -> tuple[np.ndarray, list[dict[str, bool]]]:
    """The VAE on held-out clips: PSNR of each, dB, and whether the oracle reads its reconstruction as it reads the clip."""
    import torch
    from diffusers import AutoencoderKLWan

    from models.pack.train.vae import encode, to_frames

    model = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    scenes = sample_scenes(stream(seed, 6_100_000), count, split="held_out")
    psnr: list[float] = []
    same: list[dict[str, bool]] = []
    for start in range(0, count, 16):
        clips = render(scenes[start : start + 16], range(start, min(start + 16, count)))
        with torch.inference_mode():
            made = to_frames(model.decode(encode(model, clips)).sample)
        error = ((made.astype(np.float32) - clips) ** 2).mean(axis=(1, 2, 3, 4))
        psnr += (10 * np.log10(255**2 / np.maximum(error, 1e-9))).tolist()
        for before, after in zip(clips, made, strict=True):
            seen = read(before).scene
            if seen is not None:
                same.append(match(read(after), seen))
        say(f"reconstructed {len(psnr)} of {count}")
    return np.asarray(psnr), same


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in one attribute of one figure, or in one background."""
    while True:
        shots = list(scene.shots)
        at = int(rng.integers(len(shots)))
        figures = list(shots[at].figures)
        name = str(rng.choice([*VALUES, "background"]))
        if name == "background":
            shots[at] = Shot(shots[at].figures, BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])
        else:
            one = int(rng.integers(len(figures)))
            value = VALUES[name][int(rng.integers(len(VALUES[name])))]
            changed = replace(figures[one], **{name: value})
            if name == "motion":
                size = None if value in RESIZED else changed.size or SIZES[int(rng.integers(len(SIZES)))]
                changed = replace(changed, size=size)
            figures[one] = changed
            shots[at] = Shot(tuple(figures), shots[at].background)
        made = Scene(tuple(shots))
        if made != scene and flaw(made) is None and is_complete(made, image=_is_image(scene)):
            return made


def _is_image(scene: Scene) -> bool:
    return all(figure.motion is None for figure in scene.figures)


def judged(
    path: str, made: Generated, prompts: Sequence[str], batch_size: int, say: Progress
) -> tuple[np.ndarray, float]:
    """P(yes) that the judge gives to prompt_match of the default rubric, for each clip, and CPU-seconds a question."""
    from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
    from pipelines.viewers import Judge
    from stages.rubric import load_rubric

    model = load_multimodal(MultimodalRef(path))
    asked = next(question for question in load_rubric("default").questions if question.name == "prompt_match")
    shown = evenly_spaced(made.clips, Judge().num_frames)
    answers: list[np.ndarray] = []
    began = time.process_time()
    for start in range(0, len(shown), batch_size):
        part = slice(start, start + batch_size)
        questions = [[asked.format(prompt, made.asked.num_frames)] for prompt in prompts[part]]
        answers.append(model.p_yes(shown[part], questions)[:, 0])
        say(f"judged {start + len(questions)} of {len(shown)}")
    return np.concatenate(answers), (time.process_time() - began) / len(shown)


def captioned(path: str, made: Generated, style: str, batch_size: int, say: Progress) -> tuple[int, int]:
    """How many captions say all that the oracle reads and nothing else, of clips that it reads in full."""
    from models.multimodal import MultimodalRef, evenly_spaced, load_multimodal
    from pipelines.viewers import Caption
    from stages.caption import INSTRUCTIONS

    model = load_multimodal(MultimodalRef(path))
    image = made.asked.num_frames == 1
    settings = Caption()
    shown = evenly_spaced(made.clips, settings.num_frames)
    instruction = INSTRUCTIONS[style].format(media="image" if image else "video")
    clear = [at for at, seen in enumerate(made.readings) if seen.scene and is_complete(seen.scene, image=image)]
    right = 0
    for start in range(0, len(clear), batch_size):
        rows = clear[start : start + batch_size]
        for at, (text,) in zip(rows, model.caption(shown[rows], [instruction], settings.max_new_tokens), strict=True):
            said = parse(text)
            right += bool(said and is_complete(said, image=image) and all(match(made.readings[at], said).values()))
        say(f"captioned {start + len(rows)} of {len(clear)}, {style}")
    return right, len(clear)


def load_seconds(paths: dict[str, str]) -> dict[str, float]:
    """Wall and CPU-seconds to load all parts, by the code of a run, in a process that has loaded the libraries."""
    import diffusers
    import transformers

    from models.generator import load_generator
    from models.language import LanguageRef, load_language
    from models.loading import be_quiet
    from models.multimodal import MultimodalRef, load_multimodal

    be_quiet()
    _ = diffusers.WanPipeline, transformers.AutoModelForImageTextToText, transformers.UMT5EncoderModel
    wall, cpu = time.perf_counter(), time.process_time()
    generator = load_generator(GeneratorRef(paths["generator"]))
    generator.load("encode")
    generator.load("sample")
    if "judge" in paths:
        load_multimodal(MultimodalRef(paths["judge"]))
    if "expander" in paths:
        load_language(LanguageRef(paths["expander"]))
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
