"""A judge of the user's own, as `judge.call` takes it: it does what some prompts ask for. Workers find it on PYTHONPATH."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

MENDED = "DITMILL_TEST_MENDED"


def score(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """1 for each sample, 0 where the prompt says 'poor'; raises, kills its process or gives NaN where it says so."""
    mended = Path(os.environ.get(MENDED, "/nowhere")).exists()
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
    return {"worth": values}
