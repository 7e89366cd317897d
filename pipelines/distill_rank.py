"""One rank of a training: `python -m pipelines.distill_rank DIR MINUTES`, started by `pipelines.distill_run` or torchrun.

Rank 0 writes DIR/loss.csv and says on stdout, a JSON object a line, how far it is. SIGTERM on any rank ends all of them
after a state is written.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from infra.errors import UserError
from pipelines import samples as stored
from pipelines.distill import TRAIN, Job
from pipelines.distill_stream import Samples, batches, drawn

if TYPE_CHECKING:
    from models.distill.average import Companion
    from models.distill.student import Batch, Denoiser
    from models.distill.trainer import Phase, Progress, TrainerConfig

USER_ERROR = 2


def main(folder: Path, minutes: float) -> None:
    job = Job.read(folder)

    def samples() -> Iterator[stored.StoredSample]:
        rank, world = distributed.get_rank(), distributed.get_world_size()
        return stored.read_samples(job.source, job.release, rank=rank, world=world)

    try:
        train(job, folder, samples, minutes)
    except UserError as error:
        print(json.dumps({"event": "mistake", "says": str(error)}), flush=True)
        print(f"ditmill: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(USER_ERROR)  # without waiting for the other ranks


def train(job: Job, folder: Path, samples: Samples, minutes: float) -> None:
    """Train on this rank from the newest state to the end, `minutes` or SIGTERM, and leave the averaged weights."""
    from safetensors.torch import save_file

    from models.distill.trainer import Trainer, join_group

    settings = job.config
    stop, ends = Stop(), time.monotonic() + 60 * minutes
    torch.set_num_threads(settings.deepspeed.threads)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints; stdout is for progress
        device = join_group()
    config = trainer_config(job, device)
    rank = distributed.get_rank()
    with contextlib.redirect_stdout(sys.stderr):
        parts, companion = phases(job, config, device)
        trainer = Trainer(network(job, config, job.start_path), parts, config, folder, device, companion)
    curve = Curve(folder / "loss.csv", trainer.step) if rank == 0 else None
    if curve is not None:
        _say({"event": "started", "step": trainer.step, "steps": trainer.steps})

    def report(progress: Progress) -> None:
        if curve is not None:
            curve.add(progress)
            _say({"event": "progress", **asdict(progress)})

    order = drawn(samples, TRAIN, settings.seed, settings.shuffle)
    read = batches(order, job.wanted, settings.batch_size, trainer.step * settings.accumulate)
    with contextlib.closing(read):  # type: ignore[type-var]
        trainer.run((_batch(job, columns) for columns in read), report, lambda: stop.asked or time.monotonic() > ends)
    weights = trainer.weights()
    if rank == 0:
        (folder / "weights").mkdir(exist_ok=True)
        beside = folder / "weights" / ".average.safetensors"
        save_file(weights, beside, {"step": str(trainer.step)})
        beside.replace(folder / "weights" / "average.safetensors")
        _say({"event": "ended", "step": trainer.step, "steps": trainer.steps})
    distributed.barrier()
    distributed.destroy_process_group()


def trainer_config(job: Job, device: torch.device) -> TrainerConfig:
    """The trainer's settings, with what `auto` means on this device."""
    from models.distill.trainer import TrainerConfig

    settings = job.config
    precision = settings.deepspeed.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return TrainerConfig(
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        ema=settings.ema,
        zero=settings.deepspeed.zero,
        precision=precision,
        seed=settings.seed,
        checkpoint_steps=settings.checkpoint_steps,
        checkpoint_minutes=settings.checkpoint_minutes,
        log_steps=settings.log_steps,
        **settings.optimizer.model_dump(),
    )


def network(job: Job, config: TrainerConfig, path: str | None = None) -> Denoiser:
    """The denoiser of a checkpoint, or of the teacher."""
    from models.distill.assemble import load_transformer
    from models.distill.student import Denoiser

    autocast = torch.bfloat16 if config.precision == "autocast" else None
    checkpointing = job.config.deepspeed.gradient_checkpointing
    return Denoiser(load_transformer(path or job.teacher_path, gradient_checkpointing=checkpointing), autocast)


def phases(job: Job, config: TrainerConfig, device: torch.device) -> tuple[tuple[Phase, ...], Companion | None]:
    """What the method trains, in order, and what it keeps beside the student."""
    from models.distill.assemble import load_scheduler
    from models.distill.average import Target
    from models.distill.consistency import Consistency
    from models.distill.distribution import Critic, Distribution
    from models.distill.reflow import Reflow, Straight
    from models.distill.schedule import Schedule, student_scheduler
    from models.distill.trainer import Phase, engine_of
    from models.distill.trajectory import Trajectory

    settings, scheduler = job.config, student_scheduler(load_scheduler(job.teacher_path), job.shift)
    if settings.method == "trajectory":
        said = settings.trajectory
        loss = Trajectory(said.weight, said.distance, said.huber)
        return (Phase("trajectory", settings.steps, loss),), None
    if settings.method == "distribution":
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        teacher = network(job, config).to(device, dtype).requires_grad_(False).eval()
        engine = engine_of(network(job, config), config, settings.distribution.critic_learning_rate)
        critic = Critic(engine, settings.distribution.critic_updates, shift := scheduler.config.flow_shift)
        steps = Schedule.of(scheduler, job.num_inference_steps)
        matching = Distribution(teacher, critic, job.teacher_guidance_scale, steps.sigmas, steps.timesteps, shift)
        return (Phase("distribution", settings.steps, matching),), critic
    if settings.method == "consistency":
        target = Target(network(job, config, job.start_path).to(device), settings.consistency.target_decay)
        line = Schedule.of(scheduler, settings.consistency.pieces)
        consistency = Consistency(
            target.network,
            settings.consistency.along,
            line.sigmas,
            (*line.timesteps, 0.0),
            settings.consistency.distance,
            settings.consistency.huber,
        )
        return (Phase("consistency", settings.steps, consistency),), target
    said_of = settings.reflow
    losses: dict[str, Any] = {
        "reflow": Reflow(said_of.u_shape, said_of.distance, said_of.huber),
        "distill": Straight(Schedule.of(scheduler, 1).timesteps[0], said_of.distance, said_of.huber),
    }
    if len(said_of.stages) == 1:
        return (Phase(said_of.stages[0], settings.steps, losses[said_of.stages[0]]),), None
    last = min(settings.steps - 1, max(1, round(settings.steps * said_of.last_share)))
    counts = (settings.steps - last, last)
    return tuple(Phase(name, count, losses[name]) for name, count in zip(said_of.stages, counts, strict=True)), None


def _batch(job: Job, columns: dict[str, Any]) -> Batch:
    from models.distill.student import Batch

    tensors = {name: torch.from_numpy(value) for name, value in columns.items()}
    if job.places is None:
        return Batch(**tensors)
    return Batch(**tensors, sigmas=torch.tensor(job.sigmas), timesteps=torch.tensor(job.timesteps))


class Stop:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


class Curve:
    """loss.csv: a line for each report, none past the step that a training goes on from."""

    COLUMNS = ("step", "phase", "loss", "learning_rate", "grad_norm", "seconds")

    def __init__(self, path: Path, step: int) -> None:
        kept: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if row["step"].isdecimal() and int(row["step"]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, self.COLUMNS, extrasaction="ignore")
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()

    def add(self, progress: Progress) -> None:
        self._writer.writerow(asdict(progress))
        self._file.flush()


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
