"""DecodeLatents: latents become pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from models.generator import GeneratorRef, load_generator
from models.plan import SamplerPlan
from stages.batch import Batch, size
from stages.encode import padded


@dataclass(frozen=True)
class DecodeLatents:
    """Adds `frames` [n, num_frames, height, width, 3] uint8 RGB.

    Decoded in batches of exactly `batch_size`. Samples of a pipeline that runs whole have frames already.
    """

    generators: tuple[GeneratorRef, ...]
    plan: SamplerPlan
    batch_size: int
    threads: int = 1

    name: ClassVar[str] = "decode"
    reads: ClassVar[tuple[str, ...]] = ("latents", "generator", "height", "width", "num_frames")
    adds: ClassVar[tuple[str, ...]] = ("frames",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        for ref in self.generators:
            if load_generator(ref).family is not None:
                load_generator(ref).load("decode")

    def __call__(self, batch: Batch) -> Batch:
        generator = load_generator(self.generators[int(batch["generator"][0])])
        if generator.family is None:
            return batch
        shape = (int(batch["height"][0]), int(batch["width"][0]), int(batch["num_frames"][0]))
        rows = padded(np.arange(size(batch)), self.batch_size)
        return {**batch, "frames": generator.decode(batch["latents"][rows], *shape)[: size(batch)]}
