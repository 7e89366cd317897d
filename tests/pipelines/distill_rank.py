"""A rank that learns from made-up samples, as a script: python distill_rank.py FOLDER MINUTES; and those samples."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import UserError
from models.noise import standard_normal
from pipelines.samples import Trajectory

SHAPE = (16, 2, 4, 4)
"""Of latents of 5 frames of 32 x 32 pixels."""
TOKENS, WIDTH, STEPS = 6, 32, 4


@dataclass(frozen=True)
class Sample:
    """As pipelines.samples.StoredSample, of a teacher that halves its noise in STEPS steps."""

    number: int
    row: Mapping[str, Any]
    kept: tuple[int, ...] = (0, 2, 4)
    read: list[int] = field(default_factory=list)

    def noise(self) -> np.ndarray:
        self.read.append(self.number)
        return standard_normal(f"{self.number + 1:032x}", SHAPE)

    def latents(self) -> np.ndarray:
        return self.noise() / 2

    def text(self) -> Mapping[str, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=self.number))
        return {"prompt_embeds": rng.standard_normal((TOKENS, WIDTH), dtype=np.float32)}

    def trajectory(self) -> Trajectory:
        if not self.kept:
            raise UserError("recipe: this dataset keeps no trajectories; run it with recipe: trajectory")
        sigmas = tuple(1 - place / STEPS for place in self.kept)
        states = np.stack([self.noise() * (1 + sigma) / 2 for sigma in sigmas])
        return Trajectory(states, self.kept, tuple(1000 * sigma for sigma in sigmas), sigmas, STEPS)


def row(number: int, teacher_sha256: str) -> dict[str, Any]:
    return {
        "sample_id": f"{number:032x}",
        "split": "validation" if number % 5 == 4 else "train",
        "model": "pack://tiny",
        "model_sha256": teacher_sha256,
        "adapters": [],
        "guidance_scale": 3.0,
        "run_id": "run",
        "plan_json": json.dumps({"max_sequence_length": 8, "shift": 3.0}),
        "prompt": "a red circle",
        "nfe": 2 * STEPS,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "fps": 8.0,
    }


def samples(teacher_sha256: str, count: int = 20, kept: tuple[int, ...] = (0, 2, 4)) -> Iterator[Sample]:
    for number in range(count):
        yield Sample(number, row(number, teacher_sha256), kept)


def main(folder: Path, minutes: float) -> None:
    from torch import distributed

    from pipelines.distill import Job
    from pipelines.distill_rank import train

    job = Job.read(folder)

    def mine() -> Iterator[Any]:
        rank, world = distributed.get_rank(), distributed.get_world_size()
        for sample in samples(job.teacher_sha256):
            if sample.number % world == rank:
                yield sample

    if "KILLED_AT" in os.environ:
        from pipelines import distill_rank

        say = distill_rank._say

        def killing(line: dict[str, Any]) -> None:
            say(line)
            if line.get("step") == int(os.environ["KILLED_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)

        distill_rank._say = killing
    train(job, folder, mine, minutes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
