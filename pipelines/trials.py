"""One plan on one batch of prompts: what it costs at the denoiser, and how good its clips are.

`measure` is a function of picklable values, so that a search can call it here, or many of them on the actors of a cluster.
Nothing of Ray is known here, and of storage only a folder of this machine, for what would else be computed again and again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from infra.errors import UserError
from infra.storage import replacing
from models.accelerate.genome import Space, follower, space_of
from models.accelerate.magcache import calibrate
from models.generator import load_generator
from models.loading import GeneratorRef
from models.placement import device_of
from models.plan import SamplerPlan
from pipelines.quality import QualityBudget, weighed
from stages.batch import Batch, Stage, load_json, size
from stages.decode import DecodeLatents
from stages.encode import PREFIX, EncodeText
from stages.judge import JudgeQuality
from stages.sample import SampleLatents

MOST_PSNR = 100.0
"""dB, for clips that are equal."""


@dataclass(frozen=True)
class Prompts:
    """Batches of prompts with their noise, all of one media shape, and what clips of them are measured by.

    Args:
        generator: what samples, in this process.
        reference: the plan without techniques, which others are compared with.
        budget: says by what.
        batches: as `pipelines.enumeration.planned_batch` makes them, each of `batch_size` samples but the last.
        judging: of a judge's budget, the stages that end with its scores.
        folder: of this machine, where embeddings and the reference's clips are kept.
    """

    generator: GeneratorRef
    reference: SamplerPlan
    budget: QualityBudget
    batches: tuple[Batch, ...]
    batch_size: int
    threads: int
    judging: tuple[Stage, ...]
    folder: str

    def __len__(self) -> int:
        return sum(map(size, self.batches))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and number of frames."""
        first = self.batches[0]
        return int(first["height"][0]), int(first["width"][0]), int(first["num_frames"][0])

    @property
    def digest(self) -> str:
        """16 hex digits of what the measured values depend on beside the generator and the plan."""
        keys = [str(key) for batch in self.batches for key in batch["noise_key"]]
        judged = [repr(stage) for stage in self.judging]
        text = json.dumps([keys, self.shape, self.batch_size, self.threads, self.budget.measure, judged])
        return blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Measured:
    """A plan on some samples.

    scores: float64 [n, 2], of each sample its score and the score's weight (see `pipelines.quality.lost`).
    seconds: of denoising, for a sample of each batch, [batches]: CPU-seconds, or on an accelerator seconds.
    evaluations: block evaluations of each sample, [n]; where techniques know no blocks, evaluations of the denoiser.
    nfe: evaluations of the denoiser for a sample, in whole or in part.
    """

    scores: np.ndarray
    seconds: np.ndarray
    evaluations: np.ndarray
    nfe: int

    @property
    def cost(self) -> float:
        """Seconds of a sample: the median over batches, as others use the machine too."""
        return float(np.median(self.seconds))

    @staticmethod
    def joined(parts: Sequence[Measured]) -> Measured:
        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])

        return Measured(column("scores"), column("seconds"), column("evaluations"), max(part.nfe for part in parts))


@dataclass(frozen=True)
class Refused:
    """Why a plan cannot be followed on this machine: what it would keep is more than may be kept, for one."""

    why: str


Evaluate = Callable[[Sequence[tuple[SamplerPlan, int]]], list[Measured | Refused]]
"""Each plan on the batch of prompts of this number: `measure`, one after another or many at once."""


def measure(prompts: Prompts, plan: SamplerPlan, at: int) -> Measured:
    """`plan` on batch number `at`, the same each time but for seconds. UserError where the checkpoint cannot follow it."""
    _settle(prompts)
    batch, seconds = _sampled(prompts, plan, at)
    denoiser = load_generator(prompts.generator).denoisers[0]
    blocks = len(getattr(denoiser, "blocks", "1"))
    if "accelerated" in batch:
        facts = load_json(batch["accelerated"])
        evaluations = [each["block_evaluations"] * (1 - each["skipped"]) for each in facts]
    else:
        evaluations = [float(nfe * blocks) for nfe in batch["nfe"]]
    scores = _scores(prompts, batch, at, plan == prompts.reference)
    return Measured(scores, np.array([seconds]), np.array(evaluations), int(batch["nfe"][0]))


def measure_reference(prompts: Prompts, evaluate: Evaluate) -> list[Measured]:
    """The reference on every batch, in order. Measured once, and kept."""
    parts = []
    for at in range(len(prompts.batches)):

        def make(at: int = at) -> Batch:
            (found,) = evaluate([(prompts.reference, at)])
            if isinstance(found, Refused):
                raise UserError(found.why)
            return {**vars(found), "nfe": np.array(found.nfe)}

        kept = _kept(prompts, f"reference-{at}", make)
        parts.append(Measured(**{**kept, "nfe": int(kept["nfe"])}))  # type: ignore[arg-type]
    return parts


def space(prompts: Prompts) -> Space:
    """What can be varied of the reference plan with this checkpoint, laid out so. MagCache's ratios are measured."""
    generator = load_generator(prompts.generator)
    generator.load("sample")
    follows = follower(generator.check_plan)
    described = generator.describe(prompts.reference, *prompts.shape)
    shift = described["shift"] if described["flow"] else None
    dynamic = described["scheduler_config"].get("use_dynamic_shifting") and prompts.reference.shift is None
    ratios: tuple[float, ...] = ()
    if generator.family is not None and "magcache" in generator.family.accelerators and generator.batches:
        denoisers = generator.denoisers
        if len(denoisers) == 1:
            sample = partial(_sampled, prompts, prompts.reference, 0)
            kept = _kept(prompts, "ratios", lambda: {"ratios": np.array(calibrate(denoisers[0], sample))})
            ratios = tuple(kept["ratios"].tolist())
    rounded = tuple(round(ratio, 4) for ratio in ratios)
    return space_of(follows, prompts.reference, None if dynamic or shift is None else float(shift), rounded)


@cache
def _settled(ref: GeneratorRef, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    load_generator(ref).load("sample")


_warm: set[GeneratorRef] = set()


def _settle(prompts: Prompts) -> None:
    """Once a process: load, and sample a little, so that what happens once is not counted as some plan's."""
    _settled(prompts.generator, prompts.threads)
    if prompts.generator not in _warm:
        _warm.add(prompts.generator)
        _sampled(prompts, replace(prompts.reference.shortened(1), accelerate=()), 0)


def _sampled(prompts: Prompts, plan: SamplerPlan, at: int) -> tuple[Batch, float]:
    """The batch with latents, and seconds of denoising for a sample of a full batch."""
    stage = SampleLatents((prompts.generator,), plan, prompts.batch_size, prompts.threads)
    batch = prompts.batches[at] | _conditions(prompts, plan, at)
    clock = time.process_time if device_of(prompts.generator.device) == "cpu" else time.perf_counter
    began = clock()
    made = stage(batch)
    spent = clock() - began
    together = prompts.batch_size if load_generator(prompts.generator).batches else size(batch)
    return made, spent / together


def _conditions(prompts: Prompts, plan: SamplerPlan, at: int) -> Batch:
    """What the denoiser is conditioned on: encoded once for guided plans, and once for those without guidance."""
    guided = plan.guidance_scale > 1

    def encode() -> Batch:
        stage = EncodeText((prompts.generator,), plan, prompts.batch_size, prompts.threads)
        batch = stage(prompts.batches[at])
        if failed := [str(error) for error in batch["error"] if error]:
            raise UserError(f"prompts: {failed[0]}; such a prompt cannot be tuned on, leave it out")
        return {name: value for name, value in batch.items() if name.startswith(PREFIX)}

    return _kept(prompts, f"text-{guided:d}-{at}", encode)


def _scores(prompts: Prompts, batch: Batch, at: int, is_reference: bool) -> np.ndarray:
    batch = DecodeLatents((prompts.generator,), prompts.reference, prompts.batch_size, prompts.threads)(batch)
    if prompts.budget.measure == "accuracy":
        return _right(batch)
    if prompts.budget.measure == "judge":
        return _judged(prompts, batch)
    theirs = _reference_frames(prompts, at, batch["frames"] if is_reference else None)
    error = (batch["frames"].astype(np.float32) - theirs) ** 2
    psnr = 10 * np.log10(255**2 / np.maximum(error.mean(axis=tuple(range(1, error.ndim))), 1e-9))
    return weighed(np.minimum(psnr, MOST_PSNR))


def _reference_frames(prompts: Prompts, at: int, frames: np.ndarray | None = None) -> np.ndarray:
    """Those that were kept. `frames`, where the reference has just made them, are."""

    def make() -> Batch:
        if frames is not None:
            return {"frames": frames}
        batch, _ = _sampled(prompts, prompts.reference, at)
        decode = DecodeLatents((prompts.generator,), prompts.reference, prompts.batch_size, prompts.threads)
        return {"frames": decode(batch)["frames"]}

    return _kept(prompts, f"clips-{at}", make)["frames"]


def _right(batch: Batch) -> np.ndarray:
    """Attributes of each clip that are right by the oracle, and those that its prompt says: float64 [n, 2]."""
    from models.pack.oracle import match, read
    from models.pack.phrases import parse

    found = []
    for frames, prompt in zip(batch["frames"], batch["prompt"], strict=True):
        scene = parse(str(prompt))
        if scene is None:
            raise UserError(
                f"--budget: accuracy is read by the oracle of the shapes world, and {str(prompt)[:60]!r} is no prompt of it; "
                "use judge=0.01 or psnr=30"
            )
        right = match(read(frames), scene)
        found.append((sum(right.values()), len(right)))
    return np.asarray(found, dtype=np.float64)


def _judged(prompts: Prompts, batch: Batch) -> np.ndarray:
    """The judge's score of each clip, 0 where it gave none: float64 [n, 2]."""
    for stage in prompts.judging:
        stage.load()
        batch = stage(batch)
    judge = prompts.judging[-1]
    assert isinstance(judge, JudgeQuality)
    found = []
    for row in load_json(batch["scores"]):
        answers = {item["name"]: float(item["value"]) for item in row}
        score = (
            np.mean(list(answers.values())) if judge.backend == "call" and answers else judge.rubric.overall(answers)
        )
        found.append(float(score) if np.isfinite(score) else 0.0)
    return weighed(found)


def _kept(prompts: Prompts, name: str, make: Callable[[], Batch]) -> Batch:
    """Arrays of a file, made where it is not there."""
    who = blake2b(repr((prompts.generator, prompts.reference.plan_id)).encode(), digest_size=6).hexdigest()
    file = Path(prompts.folder, f"{prompts.digest}-{who}-{name}.npz")
    if not file.exists():
        made = make()
        with replacing(file) as out:
            np.savez(out, **made)  # type: ignore[arg-type]
    with np.load(file) as found:
        return {key: found[key] for key in found.files}
