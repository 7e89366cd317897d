"""The trainer of all methods: DeepSpeed's engine with ZeRO, a learning-rate schedule, an average, states to go on from.

Runs in each rank of a torch.distributed group: NCCL on GPUs, gloo on CPUs. DeepSpeed's CPU kernels are left out, because
they are compiled where they run, and AdamW is torch's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed, nn

from infra.errors import UserError
from models.distill.average import Average, Companion, full_weights
from models.distill.state import States
from models.distill.student import Batch, Denoiser, Loss

Precision = Literal["float32", "autocast", "bfloat16"]


@dataclass(frozen=True)
class Phase:
    """A part of a training with a loss and a learning-rate schedule of its own."""

    name: str
    steps: int
    loss: Loss


@dataclass(frozen=True)
class TrainerConfig:
    """How to train. A step is one update of the weights, of `batch_size` samples on each rank times `accumulate`."""

    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    floor: float = 0.02
    """Share of the learning rate that the cosine falls to."""
    clip: float = 1.0
    """Greatest norm of a gradient; 0 for any."""
    ema: float = 0.999
    zero: Literal[1, 2, 3] = 1
    precision: Precision = "float32"
    """autocast computes in bfloat16 with float32 weights; bfloat16 keeps float32 master weights in the optimizer alone."""
    seed: int = 0
    checkpoint_steps: int = 1000
    checkpoint_minutes: float = 10.0
    log_steps: int = 50

    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's own configuration of it."""
        return {
            "train_micro_batch_size_per_gpu": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.zero},
            "bf16": {"enabled": self.precision == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 60,
        }

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at step `step` of a phase: a linear warm-up, then a cosine that ends at the floor."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        done = max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return (
            self.learning_rate * warm * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2)
        )


@dataclass(frozen=True)
class Progress:
    """Of the steps since the last one."""

    step: int
    steps: int
    phase: str
    loss: float
    """Mean over the steps, of this rank's samples."""
    learning_rate: float
    grad_norm: float
    """At the last step, before clipping."""
    seconds: float
    """A step."""


@dataclass
class Trainer:
    """A student in training on this rank. `folder` holds its states; on creation it goes on from the newest.

    `model` computes on `device`; `companion` is what the method keeps beside it, if anything.
    """

    model: Denoiser
    phases: tuple[Phase, ...]
    config: TrainerConfig
    folder: Path
    device: torch.device
    companion: Companion | None = None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.engine = engine_of(self.model, self.config, self.config.learning_rate)
        self.average = Average(self.engine, self.config.ema)
        self.states = States(self.folder / "state")
        self._saved = time.monotonic()
        if (latest := self.states.latest()) is not None:
            self.states.load(latest, self.engine, self.average, self.companion)
            self.step = latest

    @property
    def steps(self) -> int:
        """In all phases."""
        return sum(phase.steps for phase in self.phases)

    def run(
        self,
        batches: Iterable[Batch],
        report: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end, or until `stop` says so on any rank; whether it is the end. The state is saved either way.

        `batches` are those of this rank from the current step on, `accumulate` for each step.
        """
        source = iter(batches)
        losses: list[float] = []
        began = time.monotonic()
        while self.step < self.steps:
            phase, at = self._phase()
            rate = self.config.rate(at, phase.steps)
            losses.append(self._step(phase, at, rate, source))
            due = self._agree(time.monotonic() - self._saved > 60 * self.config.checkpoint_minutes)
            ends = self._agree(stop())
            saves = due or ends or self.step % self.config.checkpoint_steps == 0 or self.step == self.steps
            if saves or self.step % self.config.log_steps == 0:
                norm = self.engine.get_global_grad_norm()
                seconds = (time.monotonic() - began) / len(losses)
                mean, norm = float(np.mean(losses)), float(norm if norm is not None else 0.0)
                report(Progress(self.step, self.steps, phase.name, mean, rate, norm, seconds))
                losses, began = [], time.monotonic()
            if saves:
                self.save()
                began = time.monotonic()
            if ends:
                break
        return self.step == self.steps

    def save(self) -> None:
        """All ranks together."""
        self.states.save(self.step, self.engine, self.average, self.companion)
        self._saved = time.monotonic()

    def weights(self, averaged: bool = True) -> dict[str, torch.Tensor]:
        """The transformer's weights in float32, averaged or as trained, on the CPU. All ranks together; all get them."""
        if not averaged:
            return full_weights(self.engine, self.model.transformer)
        with self.average.in_place():
            return full_weights(self.engine, self.model.transformer)

    def _step(self, phase: Phase, at: int, rate: float, source: Iterator[Batch]) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for part in range(self.config.accumulate):
            rng = draws(self.config.seed, self.step, distributed.get_rank(), part)
            loss = phase.loss(self.engine, next(source).to(self.device), rng)
            if not torch.isfinite(loss):
                raise UserError(f"optimizer.learning_rate: the loss is {loss.item()} at step {self.step}; lower it")
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        self.average.update(at)
        if self.companion is not None:
            self.companion.update(self.model)
        self.step += 1
        return total / self.config.accumulate

    def _phase(self) -> tuple[Phase, int]:
        at = self.step
        for phase in self.phases:
            if at < phase.steps:
                return phase, at
            at -= phase.steps
        raise IndexError(f"step {self.step} is past the last phase")

    def _agree(self, wish: bool) -> bool:
        """Whether any rank wishes it: all ranks save and end at one step."""
        if distributed.get_world_size() == 1:
            return wish
        flag = torch.tensor(float(wish), device=self.device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag.item())


def engine_of(model: nn.Module, config: TrainerConfig, learning_rate: float) -> Any:
    """DeepSpeed's engine of a model and an AdamW of its own."""
    import deepspeed

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config.deepspeed())[0]


def draws(seed: int, *place: int) -> np.random.Generator:
    """The random numbers of one place in a training."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *place])))


def join_group() -> torch.device:
    """Join the group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT name; this rank's device."""
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not gpu:
        # Compiled at the first use, by a compiler that need not be there. Without it all goes through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return device
