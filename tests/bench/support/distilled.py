"""A student beside its teacher: what each makes of the same prompts from the same noise, and how the two are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from models.loading import GeneratorRef
from models.pack.oracle import match, read
from models.plan import SamplerPlan
from tests.bench.support.figures import Figure, resampled, share
from tests.bench.support.pack_parts import Asked, Progress, batches, mean_after_first

KEPT = 16
"""Clips of each arm that are kept for a contact sheet."""


@dataclass(frozen=True)
class Targets:
    """What an arm should reach: points of attribute accuracy, times less denoising, % of the teacher's diversity."""

    points: float | None = None
    times: float | None = None
    diversity: float | None = None


@dataclass
class Arm:
    """One way to make samples, and what was measured of it."""

    name: str
    ref: GeneratorRef
    plan: SamplerPlan
    targets: Targets = Targets()
    right: list[dict[str, bool]] = field(default_factory=list)
    """What the oracle says of each sample, attribute by attribute."""
    clips: list[np.ndarray] = field(default_factory=list)
    """The first KEPT."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """CPU-seconds for a sample, of each stage, batch after batch."""
    nfe: set[int] = field(default_factory=set)
    distances: dict[str, list[float]] = field(default_factory=dict)
    """Mean pairwise distance over noises, for each prompt: of latents, and of pixels from 0 to 1."""

    @property
    def counts(self) -> np.ndarray:
        """[n, 2]: attributes that are right, and those that were asked for, of each sample."""
        return np.asarray([(sum(row.values()), len(row)) for row in self.right], dtype=np.float64)

    @property
    def whole(self) -> np.ndarray:
        """[n, 2]: whether all of a sample is right, and 1."""
        return np.asarray([(all(row.values()), 1) for row in self.right], dtype=np.float64)

    def cost(self, stage: str) -> float:
        return mean_after_first(self.seconds[stage])


def make_samples(arms: Sequence[Arm], asked: Asked, batch_size: int, seed: int, say: Progress) -> None:
    """Each arm on each batch of prompts, one arm after the other, so that a busy hour of the machine is everybody's."""
    for at, batch in enumerate(_split(asked, batch_size)):
        for arm in arms:
            for made in batches(arm.ref, arm.plan, batch, batch_size, seed, lambda _: None, arm.seconds):
                frames = made["frames"]
                arm.right += [match(read(clip), scene) for clip, scene in zip(frames, batch.scenes, strict=True)]
                arm.clips += list(frames[: max(0, KEPT - len(arm.clips))])
                arm.nfe |= set(made["nfe"].tolist())
        say(f"made {min((at + 1) * batch_size, len(asked.prompts))} of {len(asked.prompts)} by each of {len(arms)}")


def measure_diversity(
    arms: Sequence[Arm], asked: Asked, noises: int, batch_size: int, seed: int, say: Progress
) -> None:
    """Mean pairwise distance of `noises` samples of each prompt. What this costs is not counted."""
    for at, (scene, prompt) in enumerate(zip(asked.scenes, asked.prompts, strict=True)):
        one = Asked((scene,) * noises, (prompt,) * noises, asked.num_frames, tuple(range(noises)))
        for arm in arms:
            made = list(batches(arm.ref, arm.plan, one, batch_size, seed, lambda _: None, {}))
            latents, frames = (np.concatenate([batch[name] for batch in made]) for name in ("latents", "frames"))
            arm.distances.setdefault("latents", []).append(mean_pairwise_distance(latents))
            arm.distances.setdefault("pixels", []).append(mean_pairwise_distance(frames / np.float32(255)))
        say(f"{noises} noises for {at + 1} of {len(asked.prompts)} prompts")


def mean_pairwise_distance(values: np.ndarray) -> float:
    """Mean over all pairs of rows of [n, ...] of the root mean square of their difference."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    return float(np.mean([np.sqrt(np.mean((one - other) ** 2)) for one, other in combinations(flat, 2)]))


def points_apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of attributes right of one arm less that of another, in points; both as `Arm.counts`, of the same samples."""
    return 100 * (_pooled(ours) - _pooled(theirs))


def ratio_of_means(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 100 * float(ours.mean() / theirs.mean()) if theirs.mean() else float("nan")


def figures_of(arm: Arm, teacher: Arm) -> Iterator[Figure]:
    """All that was measured of an arm, beside its teacher where it is another."""
    name, counts = arm.name, arm.counts
    yield resampled(name, "attributes right", lambda rows: 100 * _pooled(rows), counts, unit="%")
    yield share(name, "samples right as a whole", sum(all(row.values()) for row in arm.right), len(arm.right))
    if arm is not teacher:
        yield from compared(arm, teacher, "the teacher's", arm.targets.points)
    yield Figure(name, "evaluations a sample", float(max(arm.nfe)))
    cost = arm.cost("sample")
    yield Figure(name, "denoising a sample, CPU-seconds", cost, unit="s")
    if arm is not teacher:
        times = teacher.cost("sample") / cost
        yield Figure(name, "times less than the teacher's", times, unit="x", target=arm.targets.times)
    yield Figure(name, "decoding a sample, CPU-seconds", arm.cost("decode"), unit="s")
    for kind, found in arm.distances.items():
        values = np.asarray(found)
        yield resampled(name, f"diversity of {kind}, RMSE between noises", lambda each: float(each.mean()), values)
        if arm is not teacher:
            target = arm.targets.diversity if kind == "latents" else None
            columns = (values, np.asarray(teacher.distances[kind]))
            yield resampled(name, f"share of the teacher's, {kind}", ratio_of_means, *columns, unit="%", target=target)


def compared(arm: Arm, other: Arm, whose: str, target: float | None = None) -> Iterator[Figure]:
    """Points between two arms on the same prompts and noise, with the interval of their paired difference."""
    pairs = {"attributes": (arm.counts, other.counts), "samples": (arm.whole, other.whole)}
    for what, columns in pairs.items():
        goal = target if what == "attributes" else None
        yield resampled(arm.name, f"{what} right, less {whose}", points_apart, *columns, unit="pt", target=goal)


def _pooled(counts: np.ndarray) -> float:
    return float(counts[:, 0].sum() / counts[:, 1].sum())


def _split(asked: Asked, size: int) -> Iterator[Asked]:
    for start in range(0, len(asked.prompts), size):
        part = slice(start, start + size)
        yield replace(asked, scenes=asked.scenes[part], prompts=asked.prompts[part], indices=asked.indices[part])
