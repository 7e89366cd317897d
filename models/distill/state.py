"""States that a training goes on from: whole or not there, however it was killed.

    DIR/state/step-00001200/    DeepSpeed's own files, and of each rank its part of the average
    DIR/state/latest.json       the step to go on from, written when all ranks have written theirs

Data and noise of a step are drawn from (seed, step, rank), so that the step is all there is to know of random numbers and of
the place in the data.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from infra.errors import UserError
from models.distill.average import Average, Companion

KEPT = 2
"""States that are kept, in case the newest cannot be read."""


class States:
    """The states in `folder`, of one training on `world` ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> int | None:
        """The step of the newest whole state."""
        try:
            return int(self._said()["step"])
        except FileNotFoundError:
            return None

    def _said(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "latest.json").read_text()))

    def save(self, step: int, engine: Any, average: Average, companion: Companion | None) -> None:
        """All ranks together."""
        rank = distributed.get_rank()
        folder = self.folder / _tag(step)
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        engine.save_checkpoint(str(self.folder), tag=_tag(step), save_latest=False)
        torch.save(average.parts, folder / f"average-{rank}.pt")
        if companion is not None:
            companion.save(folder)
        distributed.barrier()
        if rank == 0:
            beside = self.folder / "latest.json.part"
            with beside.open("w") as file:
                json.dump({"step": step, "world": distributed.get_world_size()}, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.folder / "latest.json")
            states = sorted(self.folder.glob("step-*"))
            later = [old for old in states if old.name > _tag(step)]  # of attempts that were killed while they saved
            for old in [*states[: -KEPT - len(later)], *later]:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, step: int, engine: Any, average: Average, companion: Companion | None) -> None:
        """All ranks together, on as many as saved it; UserError on others."""
        folder, world = self.folder / _tag(step), distributed.get_world_size()
        if (saved := int(self._said()["world"])) != world:
            raise UserError(
                f"deepspeed.ranks: the state to go on from was written by {saved}, found {world};"
                f" train on {saved} again, or name another folder"
            )
        found, _ = engine.load_checkpoint(str(self.folder), tag=_tag(step))
        if found is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state here")
        device = engine.device
        parts = torch.load(folder / f"average-{distributed.get_rank()}.pt", map_location=device, weights_only=True)
        for part, saved in zip(average.parts, parts, strict=True):
            part.copy_(saved)
        if companion is not None:
            companion.load(folder, device)


def _tag(step: int) -> str:
    return f"step-{step:08d}"
