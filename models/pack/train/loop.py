"""The loop that every part of the pack is trained with: resumable, stopped by the clock, the same data at the same step.

Step n draws its data and its noise from (seed, n) alone. A run that was stopped and goes on therefore does what a run that
was never stopped would have done, on the same kind of machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CHECKPOINT_MINUTES = 4.0
LOG_STEPS = 50
AVERAGED = 20.0
"""Weights are averaged over one part in so many of all steps."""


def arguments(doc: str | None, *, steps: int, batch_size: int, learning_rate: float) -> argparse.ArgumentParser:
    """What every script takes; each adds its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/pack"), help="where states and checkpoints are kept")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; run again to go on")
    parser.add_argument("--steps", type=int, default=steps, help="steps in all, over which the learning rate falls")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that make data ahead; 0 for none")
    parser.add_argument("--bfloat16", action="store_true", help="on a CPU too, worth it where it has avx512_bf16")
    parser.add_argument("--compile", action="store_true", help="compile the model, worth it on a GPU")
    return parser


def set_up(options: argparse.Namespace) -> torch.device:
    """The device to train on: a GPU where there is one."""
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def precision(options: argparse.Namespace, device: torch.device) -> Iterator[None]:
    """bfloat16 where it is fast, else float32. On a CPU attention is then written out: the fused one is slow backwards."""
    enabled = device.type == "cuda" or options.bfloat16
    attention = sdpa_kernel(SDPBackend.MATH) if enabled and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled), attention:
        yield


def stream(seed: int, *place: int) -> np.random.Generator:
    """The random numbers of one place in a training: (seed, step), or more."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *place])))


PART = 64
"""Clips of one file of made data."""


def write_parts(folder: Path, options: argparse.Namespace, make: Callable[[int], dict[str, Any]]) -> None:
    """Write `options.clips` made clips, PART a file, each file whole or not at all; what is there stays. `make(part)` gives
    a file's arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = time.monotonic() + 60 * options.minutes
    for part in range(-(-options.clips // PART)):
        path = folder / f"{part:04d}.npz"
        if not path.exists():
            beside = path.with_suffix(".part.npz")
            np.savez(beside, allow_pickle=False, **make(part))
            beside.rename(path)
            print(path, flush=True)
        if time.monotonic() > ended:
            break


def read_parts(folder: Path) -> list[dict[str, np.ndarray]]:
    """What `write_parts` wrote, file by file."""
    return [dict(np.load(path)) for path in sorted(folder.glob("*.npz")) if ".part" not in path.name]


class Average:
    """Exponential moving average of a model's weights, quick at first: what is evaluated and shipped."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, weight in model.state_dict().items():
            if weight.dtype.is_floating_point:
                self.weights[name].lerp_(weight, 1 - keep)
            else:
                self.weights[name].copy_(weight)


def matrices(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The weights that Muon trains, each with a view of it as a matrix: those of linear layers and of convolutions.

    Muon (Jordan et al. 2024) makes a step's update orthogonal. Per step it learns as much as AdamW in two or more, here too.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and module.weight.requires_grad
    ]
    return [(weight, nn.Parameter(weight.data.flatten(1))) for weight in found if id(weight) not in shared]


@dataclass
class Training:
    """A model in training. `state` in `folder` holds everything that is needed to go on."""

    name: str
    model: nn.Module
    options: argparse.Namespace
    average: Average = field(init=False)
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._matrices = matrices(self.model)
        taken = {id(weight) for weight, _ in self._matrices}
        others = [weight for weight in self.model.parameters() if id(weight) not in taken]
        rate = self.options.learning_rate
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
            "muon": torch.optim.Muon(
                [view for _, view in self._matrices], lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
        }
        self.average = Average(self.model, max(0.0, 1 - AVERAGED / self.options.steps))
        self._load()

    @property
    def state(self) -> Path:
        return Path(self.options.folder) / f"{self.name}.state.pt"

    def run(
        self, make: Callable[[int], Any], loss: Callable[[int, Any], dict[str, torch.Tensor]], until: int | None = None
    ) -> None:
        """Train until the minutes or the steps are over, or at step `until`.

        `make(step)` gives the data of a step, made by a worker where there are any; `loss` gives terms to add up.
        """
        ended = time.monotonic() + 60 * self.options.minutes
        saved = logged = time.monotonic()
        sums: dict[str, float] = {}
        first = self.step
        for data in _ahead(make, range(self.step, until or self.options.steps), self.options.workers):
            torch.manual_seed(self.options.seed * 1_000_003 + self.step)
            self._rate()
            terms = loss(self.step, data)
            total = torch.stack(list(terms.values())).sum()
            if not torch.isfinite(total):
                raise FloatingPointError(f"{self.name}: the loss is {total.item()} at step {self.step}")
            self.model.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for weight, view in self._matrices:
                view.grad = None if weight.grad is None else weight.grad.reshape(view.shape)
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.average.update(self.model, self.step)
            self.step += 1
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.detach())
            if self.step % LOG_STEPS == 0 or self.step - first == 1:
                count = 1 if self.step - first == 1 else min(LOG_STEPS, self.step - first - 1)
                seconds = (time.monotonic() - logged) / count
                said = "  ".join(f"{name} {value / count:.5f}" for name, value in sums.items())
                print(f"{self.name} {self.step:6d}  {said}  {seconds:.3f} s a step", flush=True)
                sums, logged = {}, time.monotonic()
            if time.monotonic() - saved > 60 * CHECKPOINT_MINUTES:
                self.save()
                saved = time.monotonic()
            if time.monotonic() > ended:
                break
        self.save()

    def save(self) -> None:
        """Write the state under another name first, so that a kill leaves the old one or the new one."""
        self.state.parent.mkdir(parents=True, exist_ok=True)
        beside = self.state.with_suffix(".part")
        torch.save(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.weights,
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            },
            beside,
        )
        beside.replace(self.state)

    def _load(self) -> None:
        if not self.state.exists():
            return
        found = torch.load(self.state, map_location=next(self.model.parameters()).device, weights_only=True)
        self.model.load_state_dict(found["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(found["optimizers"][name])
        self.average.weights = found["average"]
        self.step = found["step"]
        print(f"{self.name}: going on at step {self.step}", flush=True)

    def _rate(self) -> None:
        """Warm up over the first hundredth, then fall along a cosine to a fiftieth."""
        done = self.step / max(1, self.options.steps)
        share = min(1.0, 100 * done + 0.01) * (0.51 + 0.49 * math.cos(math.pi * done))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * share


class _Steps(torch.utils.data.Dataset):
    def __init__(self, make: Callable[[int], Any], steps: range) -> None:
        self.make, self.steps = make, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, at: int) -> Any:
        return self.make(self.steps[at])


def _ahead(make: Callable[[int], Any], steps: range, workers: int) -> Iterable[Any]:
    """Data of each step in order, made by other processes while the model trains if there are any."""
    if not workers:
        return map(make, steps)
    return torch.utils.data.DataLoader(
        _Steps(make, steps), batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=None
    )
