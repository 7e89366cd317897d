"""A training from start to end: ranks as processes, then the checkpoint, then the evaluation."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.ranks import run_ranks
from infra.storage import Storage
from pipelines.distill import Job, assemble, held_out, prepare
from pipelines.distill_evaluate import Evaluation, evaluate
from pipelines.distill_rank import USER_ERROR
from pipelines.distill_settings import Distill

REPO = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "pipelines.distill_rank")
"""A rank; the folder and the minutes follow."""

Event = Callable[[dict[str, Any]], None]
"""Told what rank 0 says: event (started, progress, ended), step, steps and more."""


def prepared(storage: Storage, release: str, settings: Distill, out: Path) -> Job:
    """`pipelines.distill.prepare`, once it is sure that there is a trainer."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            'distill: DeepSpeed is not installed; DS_BUILD_OPS=0 pip install --no-build-isolation -e ".[train]"'
        )
    world_of(settings)
    return prepare(storage, release, settings, out)


def train(
    job: Job,
    out: Path,
    minutes: float,
    say: Event = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
    command: Sequence[str] = COMMAND,
) -> int:
    """Train on the ranks that the settings ask for; the step that was reached. UserError where a rank found a mistake.

    None are started where all steps are done, by whatever ranks.
    """
    if trained_steps(out) == job.config.steps:
        return job.config.steps
    reached, mistakes = [0], list[str]()

    def hear(text: str) -> None:
        try:
            line = json.loads(text)
        except ValueError:
            return  # what a library printed
        if not isinstance(line, dict):
            return
        reached[0] = int(line.get("step", reached[0]))
        if line.get("event") == "mistake":
            mistakes.append(str(line["says"]))
        else:
            say(line)

    threads = str(job.config.deepspeed.threads)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": threads,
        "MKL_CBWR": "AUTO,STRICT",
        "PYTHONWARNINGS": "ignore",  # DeepSpeed's, on every line of the log
        "TOKENIZERS_PARALLELISM": "false",
    }
    ended = run_ranks([*command, str(out), repr(minutes)], world_of(job.config), hear, environment, stop)
    if mistakes:
        raise UserError(mistakes[0])
    if ended.code == USER_ERROR:
        raise UserError(ended.tail.rsplit("ditmill: ", 1)[-1])
    if ended.code == -signal.SIGTERM and stop():
        raise UserError("distill: stopped before its processes had begun; run the same command again")
    if ended.code:
        raise RuntimeError(f"rank {ended.rank} ended with {ended.code}; run it again to go on. It said:\n{ended.tail}")
    return reached[0]


def trained_steps(out: Path) -> int:
    """Of the averaged weights that ranks have left in `out`; 0 where they have left none."""
    from safetensors import safe_open

    try:
        with safe_open(out / "weights" / "average.safetensors", framework="np") as file:
            return int((file.metadata() or {}).get("step", 0))
    except FileNotFoundError:
        return 0


def world_of(settings: Distill) -> int:
    """How many ranks: one for each GPU where the settings leave it open. UserError where they ask for more than GPUs."""
    import torch

    ranks, devices = settings.deepspeed.ranks, torch.cuda.device_count()
    if devices and ranks > devices:
        raise UserError(f"deepspeed.ranks: each wants a GPU of its own, found {ranks} and {devices} GPUs; give fewer")
    return ranks or max(1, devices)


def publish(job: Job, out: Path, trained: int) -> Evaluation | None:
    """Write the student, and compare it with its teacher; None where there is nothing to compare on."""
    assemble(job, out, trained)
    samples = held_out(job)
    if not samples:
        return None
    found = evaluate(job, out, samples, job.num_inference_steps)
    (out / "evaluation.json").write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found
