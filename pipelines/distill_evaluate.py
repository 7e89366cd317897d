"""Teacher against student: the same held-out prompts from the same noise. The teacher's side is in the dataset."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.generator import Generator
from models.loading import GeneratorRef
from models.plan import SamplerPlan
from pipelines.distill import Job
from pipelines.distill_stream import read
from pipelines.samples import StoredSample

WORLD = "pack://shapes"
"""The teacher whose clips an oracle reads."""


@dataclass(frozen=True)
class Evaluation:
    """Over `samples` samples; latents are compared sample by sample."""

    samples: int
    num_inference_steps: int
    rmse: float
    """Root mean square difference of latents, mean over samples."""
    relative_rmse: float
    """The same, over the root mean square of the teacher's."""
    cosine: float
    nfe: dict[str, float]
    """Denoiser evaluations of a sample: teacher, student."""
    cpu_seconds: float
    """Of the student's denoising, a sample."""
    accuracy: dict[str, dict[str, Any]] | None
    """Attribute -> teacher and student, each share, low, high (95%) and asked; None where no oracle reads the clips."""

    def __str__(self) -> str:
        lines = [
            f"{self.samples} held-out samples, {self.num_inference_steps} steps: latents differ by {self.rmse:.4f} RMSE"
            f" ({self.relative_rmse:.1%}), cosine {self.cosine:.4f}",
            f"  NFE        teacher {self.nfe['teacher']:.0f}  student {self.nfe['student']:.0f}",
        ]
        for name, both in (self.accuracy or {}).items():
            lines.append(f"  {name:10} " + "  ".join(f"{who} {_percent(one)}" for who, one in both.items()))
        return "\n".join(lines)


def evaluate(job: Job, student: Path, samples: Sequence[StoredSample], num_inference_steps: int) -> Evaluation:
    """Sample by the code of a run; `samples` are the teacher's, of one shape, at least one."""
    generator = Generator(GeneratorRef(str(student)))
    plan = SamplerPlan(num_inference_steps=num_inference_steps, guidance_scale=1.0, max_sequence_length=job.text_length)
    wanted = replace(job.wanted, places=None, shape=None)
    size = job.config.evaluate.batch_size
    squares, norms, cosines, seconds = [], [], [], []
    readings: dict[str, list[dict[str, bool]]] = {"teacher": [], "student": []}
    nfe = 0
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        batch, row = read(part, wanted), part[0].row
        shape = (row["height"], row["width"], row["num_frames"])
        began = time.process_time()
        made, nfe = generator.sample(
            {"prompt_embeds": batch["prompt_embeds"]}, batch["noise"], plan, *shape, row["fps"] or 1.0
        )
        seconds.append((time.process_time() - began) / len(part))
        mine, theirs = (value.reshape(len(part), -1).astype(np.float64) for value in (made, batch["latents"]))
        squares += ((mine - theirs) ** 2).mean(1).tolist()
        norms += (theirs**2).mean(1).tolist()
        cosines += ((mine * theirs).sum(1) / (np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1))).tolist()
        if job.teacher == WORLD:
            for who, latents in (("teacher", batch["latents"]), ("student", made)):
                clips = generator.decode(latents, *shape)
                readings[who] += _read(clips, [sample.row["prompt"] for sample in part])
    return Evaluation(
        samples=len(samples),
        num_inference_steps=num_inference_steps,
        rmse=float(np.sqrt(squares).mean()),
        relative_rmse=float(np.sqrt(np.sum(squares) / np.sum(norms))),
        cosine=float(np.mean(cosines)),
        nfe={"teacher": float(np.mean([sample.row["nfe"] for sample in samples])), "student": float(nfe)},
        cpu_seconds=float(np.mean(seconds[1:] or seconds)),
        accuracy=_accuracy(readings) if readings["student"] else None,
    )


def _read(clips: np.ndarray, prompts: Sequence[str]) -> list[dict[str, bool]]:
    """What the oracle says of each clip whose prompt it can read, attribute by attribute."""
    from models.pack.oracle import match
    from models.pack.oracle import read as see
    from models.pack.phrases import parse

    asked = ((clip, parse(prompt)) for clip, prompt in zip(clips, prompts, strict=True))
    return [match(see(clip), scene) for clip, scene in asked if scene is not None]


def _accuracy(readings: dict[str, list[dict[str, bool]]]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for one in readings["teacher"] for name in one)
    shown: dict[str, dict[str, Any]] = {}
    for name in names:
        shown[name] = {who: share([one[name] for one in said if name in one]) for who, said in readings.items()}
    mean = {who: share([right for one in said for right in one.values()]) for who, said in readings.items()}
    whole = {who: share([all(one.values()) for one in said]) for who, said in readings.items()}
    return {**shown, "attributes": mean, "all": whole}


def _percent(one: dict[str, Any]) -> str:
    return f"{100 * one['share']:.1f}% ({100 * one['low']:.1f} to {100 * one['high']:.1f})"


def share(right: Sequence[bool]) -> dict[str, float]:
    """Share, its 95% interval by Wilson, and how many were asked."""
    from scipy.stats import binomtest

    asked = len(right)
    if not asked:
        return {"share": 0.0, "low": 0.0, "high": 1.0, "asked": 0}
    low, high = binomtest(sum(right), asked).proportion_ci(method="wilson")
    return {"share": sum(right) / asked, "low": float(low), "high": float(high), "asked": asked}
