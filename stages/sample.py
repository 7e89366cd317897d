"""SampleLatents: noise and conditions become latents."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from models.accelerate.course import Savings
from models.generator import Generator, GeneratorRef, load_generator
from models.noise import noise_sha256, standard_normal
from models.path import Path
from models.placement import device_name
from models.plan import SamplerPlan
from stages.batch import Batch, size, texts
from stages.early import EarlyReject
from stages.encode import PREFIX, padded


@dataclass(frozen=True)
class SampleLatents:
    """Adds `latents` [n, channels, frames, height, width] float32 (images: no frames), `nfe` int64, `plan_json`, and where
    it was made: `node` and `device`.

    Each sample starts from its own noise, and is denoised in a batch of exactly `batch_size`. A pipeline that runs whole
    adds `frames` instead of `latents`. Fails samples as `nan_latents`.

    With `hash_noise` also `noise_sha256`, of the noise's float32 bytes in C order; with `keep`, places of states (see
    `models.path`), also `trajectory` [n, states, *latent_shape] float32. Where the plan has techniques also `accelerated`,
    JSON of what they saved of each sample (see `models.accelerate.course`). With `early` also what it tells of each sample;
    those that it stops fail as `early`.
    """

    generators: tuple[GeneratorRef, ...]
    plan: SamplerPlan
    batch_size: int
    threads: int = 1
    hash_noise: bool = False
    keep: tuple[int, ...] = ()
    early: EarlyReject | None = None

    name: ClassVar[str] = "sample"
    reads: ClassVar[tuple[str, ...]] = ("cond.*", "noise_key", "generator", "height", "width", "num_frames", "fps")
    adds: ClassVar[tuple[str, ...]] = ("latents", "nfe", "plan_json", "node", "device")
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        for ref in self.generators:
            load_generator(ref).load("sample")
            load_generator(ref).lay_out(self.plan)
            at = None if self.early is None else self.early.at
            load_generator(ref).check_plan(self.plan, with_path=bool(self.keep), early_at=at)
        if self.early is not None:
            self.early.load(self.threads)

    def __call__(self, batch: Batch) -> Batch:
        generator = load_generator(self.generators[int(batch["generator"][0])])
        shape = (int(batch["height"][0]), int(batch["width"][0]), int(batch["num_frames"][0]))
        fps = float(batch["fps"][0])
        result = dict(batch)
        if generator.family is None:
            result["frames"], nfe = generator.run_whole(
                list(batch["prompt"]), list(batch["negative_prompt"]), list(batch["noise_key"]), self.plan, *shape, fps
            )
        else:
            made, nfe = self._sample(generator, batch, shape, fps)
            result |= made
            latents = result["latents"]
            finite = np.isfinite(latents).reshape(len(latents), -1).all(axis=1)
            if not finite.all():
                for name, text in (("error_type", "nan_latents"), ("error", "the latents are not finite")):
                    result[name] = np.where(finite, result[name], texts([text] * len(latents)))
                latents[~finite] = 0
        described = json.dumps(generator.describe(self.plan, *shape), sort_keys=True)
        result.setdefault("nfe", np.full(size(batch), nfe, dtype=np.int64))
        result["plan_json"] = texts([described] * size(batch))
        result["node"] = texts([socket.gethostname()] * size(batch))
        result["device"] = texts([device_name(generator.ref.device)] * size(batch))
        return result

    def _sample(self, generator: Generator, batch: Batch, shape: tuple[int, int, int], fps: float) -> tuple[Batch, int]:
        count = size(batch)
        rows = padded(np.arange(count), self.batch_size if generator.batches else count)
        latent_shape = generator.latent_shape(*shape)
        noise = np.stack([standard_normal(key, latent_shape) for key in batch["noise_key"]])
        conditions = {
            name.removeprefix(PREFIX): value[rows] for name, value in batch.items() if name.startswith(PREFIX)
        }
        path = Path(self.keep, self.plan.num_inference_steps) if self.keep else None
        savings = Savings()
        early = None if self.early is None else self.early.watch(batch)
        latents, nfe = generator.sample(conditions, noise[rows], self.plan, *shape, fps, path, savings, early)
        made: Batch = {"latents": latents[:count]}
        if self.early is not None and early is not None:
            made["latents"][early.stopped] = 0
            made |= self.early.told(batch, early, nfe)
        if savings.facts:
            made["accelerated"] = texts([json.dumps(facts, sort_keys=True) for facts in savings.facts[:count]])
        if path is not None:
            made["trajectory"] = path.states[:count]
        if self.hash_noise:
            made["noise_sha256"] = texts([noise_sha256(values) for values in noise])
        return made, nfe
