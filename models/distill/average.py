"""The moving average of a student's weights, cut over the ranks as ZeRO cuts its master weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed, nn

_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""What ZeRO 1 and 2, ZeRO 3 and DeepSpeed's bfloat16 optimizer call the float32 weights that this rank keeps."""


class Average:
    """Exponential moving average in float32 of this rank's part of the weights: no rank holds, or sends, more."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._masters = masters(engine)
        self.parts = [part.detach().clone() for part in self._masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step` of a phase, counted from 0: quick at first, so that it forgets where the phase began."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for part, master in zip(self.parts, self._masters, strict=True):
            part.lerp_(master, 1 - keep)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the master weights are the averaged ones."""
        before = [master.detach().clone() for master in self._masters]
        self._fill(self.parts)
        try:
            yield
        finally:
            self._fill(before)

    @torch.no_grad()
    def _fill(self, parts: list[torch.Tensor]) -> None:
        for master, part in zip(self._masters, parts, strict=True):
            master.data.copy_(part)


def masters(engine: Any) -> list[torch.Tensor]:
    """The float32 weights that this rank's optimizer steps, flat."""
    for name in _MASTERS:
        if found := getattr(engine.optimizer, name, None):
            return list(found)
    raise RuntimeError(
        f"{type(engine.optimizer).__name__} of this DeepSpeed keeps its float32 weights under no known name"
    )


def full_weights(engine: Any, module: nn.Module) -> dict[str, torch.Tensor]:
    """The float32 weights of a module of the engine, whole, on the CPU. All ranks must call it; all get them."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[str, torch.Tensor] = {}
    for name, weight in module.named_parameters():
        whole = safe_get_full_fp32_param(weight)
        found[name] = (weight if whole is None else whole).detach().float().cpu().clone()
    return found


class Companion(Protocol):
    """What a method keeps beside the student, and a training's states with it. All calls are of all ranks together."""

    def update(self, student: nn.Module) -> None:
        """After each step."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path, device: torch.device) -> None: ...


class Target:
    """A second network that follows the student's weights: what a consistency loss compares with. Whole on each rank."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network.requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        import deepspeed

        pairs = list(zip(self.network.parameters(), student.parameters(), strict=True))
        with deepspeed.zero.GatheredParameters([weight for _, weight in pairs]):
            for mine, weight in pairs:
                mine.lerp_(weight.to(mine.dtype), 1 - self.decay)

    def save(self, folder: Path) -> None:
        if distributed.get_rank() == 0:
            torch.save(self.network.state_dict(), folder / "target.pt")

    def load(self, folder: Path, device: torch.device) -> None:
        self.network.load_state_dict(torch.load(folder / "target.pt", map_location=device, weights_only=True))
