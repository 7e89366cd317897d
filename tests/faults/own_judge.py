"""A judge of the user's own, as `judge.call` takes it: it does what some prompts ask for. Workers find it on PYTHONPATH."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

WORLD = "DITMILL_TEST_WORLD"
"""Environment variable: a folder. Once it holds `mended` the judge does no harm; `disk` in it is a small disk, if mounted."""


def score(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """1 for each sample, 0 where the prompt says 'poor'; where it says so, it raises, kills its process, gives NaN or
    leaves no space on the disk."""
    world = Path(os.environ[WORLD])
    mended = (world / "mended").exists()
    values = np.ones(len(batch["prompt"]))
    for at, prompt in enumerate(batch["prompt"]):
        if "poor" in prompt:
            values[at] = 0.0
        if mended:
            continue
        if "raise" in prompt:
            raise RuntimeError("the judge stumbled")
        if "kill" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "nothing" in prompt:
            values[at] = np.nan
        if "fill" in prompt:
            fill(world / "disk")
    return {"worth": values}


def fill(disk: Path) -> None:
    """Take all the space of a disk; where it is none of its own, this process finds none there when a write ends."""
    if not disk.is_mount():
        os.replace, os.link = _full(os.replace, disk), _full(os.link, disk)
        return
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def _full(step: Callable[..., None], disk: Path) -> Callable[..., None]:
    def refuse(source: str | Path, path: str | Path) -> None:
        if Path(path).is_relative_to(disk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        step(source, path)

    return refuse
