"""One rank of trainings on made-up batches, one after the other, as a script: python rank.py JOB.json..."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(jobs: list[dict[str, Any]]) -> None:
    import torch

    from models.distill.trainer import join_group

    torch.set_num_threads(1)
    device = join_group()
    for job in jobs:
        train(job, device)


def train(job: dict[str, Any], device: Any) -> None:
    import torch
    from safetensors.torch import save_file
    from torch import distributed

    from models.distill.average import Target
    from models.distill.consistency import Consistency
    from models.distill.distribution import Critic, Distribution
    from models.distill.reflow import Reflow, Straight
    from models.distill.student import Batch, Denoiser
    from models.distill.trainer import Phase, Trainer, TrainerConfig, draws, engine_of
    from models.distill.trajectory import Trajectory

    config = TrainerConfig(**job["config"])
    autocast = torch.bfloat16 if config.precision == "autocast" else None
    model = Denoiser(tiny_transformer(), autocast)
    companion: Any = None
    if job["method"] == "consistency":
        companion = Target(Denoiser(tiny_transformer(), autocast), 0.9)
    if job["method"] == "distribution":
        companion = Critic(engine_of(Denoiser(tiny_transformer(), autocast), config, 2e-3), updates=2, shift=3.0)
    teacher = Denoiser(tiny_transformer(), autocast).requires_grad_(False)
    steps = ((1.0, 0.75, 0.0), (999.0, 750.0))
    phases = {
        "reflow": lambda: (Phase("reflow", 4, Reflow()), Phase("distill", 3, Straight())),
        "trajectory": lambda: (Phase("trajectory", 7, Trajectory()),),
        "consistency": lambda: (Phase("consistency", 7, Consistency(companion.network)),),
        "distribution": lambda: (Phase("distribution", 7, Distribution(teacher, companion, 1.5, *steps, 3.0)),),
    }[job["method"]]()
    trainer = Trainer(model, phases, config, Path(job["folder"]), device, companion)
    rank = distributed.get_rank()

    def batches(step: int) -> Iterator[Batch]:
        while True:
            rng = draws(7, step // config.accumulate, rank, step % config.accumulate)
            noise, latents, text, states = (
                torch.from_numpy(rng.standard_normal((config.batch_size, *shape), dtype="float32"))
                for shape in ((4, 2, 4, 4), (4, 2, 4, 4), (3, 8), (3, 4, 2, 4, 4))
            )
            sigmas, timesteps = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([999.0, 500.0, 0.0])
            yield Batch(noise, latents, text, states, sigmas, timesteps, torch.zeros_like(text))
            step += 1
            if rank == 0 and step // config.accumulate == job["killed_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    losses: list[float] = []
    trainer.run(batches(trainer.step * config.accumulate), lambda progress: losses.append(progress.loss))
    weights = {"average/" + name: value for name, value in trainer.weights().items()}
    weights |= {"last/" + name: value for name, value in trainer.weights(averaged=False).items()}
    if rank == 0:
        save_file(weights, Path(job["folder"]) / "weights.safetensors")
        (Path(job["folder"]) / "losses.json").write_text(json.dumps(losses))
    distributed.barrier()


def tiny_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    from models.pack.tiny import fill_weights

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )
    fill_weights(transformer, "transformer")
    return transformer


if __name__ == "__main__":
    main([json.loads(Path(path).read_text()) for path in sys.argv[1:]])
