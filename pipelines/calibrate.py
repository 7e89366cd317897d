"""How long a batch takes in each stage, and how many bytes it leaves, from one small batch in this process."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Storage
from models.endpoint_client import EndpointRef
from models.multimodal import MultimodalRef
from models.parallel.degrees import Degrees
from models.vllm import VllmRef
from pipelines.enumeration import PLANNED, Planned, planned_batch
from pipelines.identity import sample_ids
from pipelines.recipes import RECIPES
from pipelines.records import expand_rows, unique_records
from pipelines.resolve import Resolved
from stages.actor import run_stage
from stages.batch import Batch, Stage, texts
from stages.early import NAME, SECONDS, EarlyReject

STEPS = 2
"""Denoising steps of the calibration batch; the plan's are extrapolated by function evaluations."""


@dataclass(frozen=True)
class Look:
    """What early rejection costs. `seconds` of a sample's look are part of its sampling, `rest` are those that a stopped one
    is spared: of the steps after it, of decoding and judging. `nbytes` is the model that each sampling actor holds beside
    the generator.
    """

    seconds: float
    rest: float
    step: int
    steps: int
    nbytes: int

    def __str__(self) -> str:
        pays = f"pays where more than {self.seconds / self.rest:.0%} of the samples are stopped"
        return (
            f"early rejection: a look after step {self.step} of {self.steps} takes {self.seconds:.3g} s a sample, one that is"
            f" stopped is spared {self.rest:.3g} s: {pays}; each sampling actor also holds {self.nbytes / 1e6:.0f} MB of the"
            " model that looks"
        )


@dataclass(frozen=True)
class Calibration:
    """Seconds of one full batch in each stage (sampling at the plan's own steps), NFE and bytes of one sample.

    `load_seconds` is the time all models took to load. Accepted and rejected samples leave different bytes; these are the
    mean over the batch.
    """

    samples: int
    stage_seconds: dict[str, float]
    load_seconds: float
    nfe: int
    nbytes: float
    kinds: dict[str, float]
    """Of these bytes, what media take of a sample, and embeddings of each distinct text."""
    look: Look | None = None


def calibrate(run: Resolved) -> Calibration | None:
    """Take one batch of the run's first prompts through all stages; None if no prompt can be sampled.

    Stages that ask an endpoint are left out: a plan costs nothing.
    """
    batch_size = run.spec.layout.batch_size
    rows = list(_first(run, batch_size))
    if not rows:
        return None
    batch = planned_batch(_planned(run, rows), run.spec.seed, {})
    short = run.plan.shortened(STEPS)
    # A teacher's steps cost more than its student's few, techniques skip none of the first ones, and the look is at one.
    if run.plan.accelerate or run.early is not None or any(ref.teacher is not None for ref in run.generators):
        short = run.plan
    seconds: dict[str, float] = {}
    load = 0.0
    nfe = 0
    kinds: dict[str, float] = {}
    looked: Batch = {}
    with tempfile.TemporaryDirectory(prefix="ditmill-calibrate-") as folder:
        recipe = RECIPES[run.spec.recipe]
        # By one process, whatever the layout: what it takes is about what the ranks of a group take together.
        alone = tuple(replace(ref, parallel=Degrees()) for ref in run.generators)
        trial = replace(run, plan=short, storage=Storage(folder), generators=alone)
        stages = (*recipe.generating(trial), *recipe.judging(trial))
        for stage in (each for each in stages if not _is_elsewhere(each)):
            began = time.perf_counter()
            stage.load()
            load += time.perf_counter() - began
            if stage.name == "sample":
                run_stage(stage, batch)  # the first call is slow everywhere
            if stage.name == "write" and "text" in batch:
                kinds["text"] = float(np.mean([len(data) for data in batch["text"]]))
            began = time.perf_counter()
            batch, _ = run_stage(stage, batch)
            seconds[stage.name] = time.perf_counter() - began
            if stage.name == "sample":
                scale = run.plan.num_inference_steps / short.num_inference_steps
                seconds["sample"] *= scale
                nfe = round(int(np.max(batch.get("nfe", np.zeros(1)))) * scale)
                looked = {name: batch[name] for name in (NAME, SECONDS) if name in batch}
        look = None if run.early is None or not looked else _look(run.early, looked, seconds, short.num_inference_steps)
        result = json.loads(batch["result"][0])
        kinds["media"] = _media_bytes(trial.storage, result)
    count = result["accepted"] + result["rejected"]
    nbytes = (result["media_nbytes"] + sum(part["nbytes"] for part in result["parts"])) / max(1, count)
    return Calibration(len(rows), seconds, load, nfe, nbytes, kinds, look)


def _look(early: EarlyReject, batch: Batch, stages: dict[str, float], steps: int) -> Look:
    """Of a batch that each of the stages took so many seconds for, the look among those of sampling."""
    step, seconds = json.loads(batch[NAME][0])["step"], float(batch[SECONDS][0])
    count = len(batch[SECONDS])
    after = sum(stages.get(name, 0.0) for name in ("decode", "score", "screen", "judge")) / count
    rest = (stages["sample"] / count - seconds) * (1 - step / steps) + after
    held = Path(early.model.path).rglob("*.safetensors") if isinstance(early.model, MultimodalRef) else ()
    return Look(seconds, rest, step, steps, sum(file.stat().st_size for file in held))


def _media_bytes(storage: Storage, result: dict[str, Any]) -> float:
    """Mean over the accepted samples."""
    sizes = [
        sum(item["nbytes"] for item in row["media"])
        for part in result["parts"]
        if part["table"] == "samples"
        for row in pq.read_table(storage.path(part["path"]), columns=["verdict", "media"]).to_pylist()
        if row["verdict"] == "accepted"
    ]
    return float(np.mean(sizes)) if sizes else 0.0


def _is_elsewhere(stage: Stage) -> bool:
    """Whether it asks an endpoint, whose answers may cost, or vLLM, which the workers' GPUs are for."""
    return any(isinstance(getattr(stage, name, None), (EndpointRef, VllmRef)) for name in ("model", "verifier"))


def _first(run: Resolved, count: int) -> Iterator[dict[str, Any]]:
    """Rows of the first prompts of one media shape, as they stand in the records."""
    shape = None
    for record in islice(unique_records(run.spec), 64 * count):
        found = (record.height, record.width, record.num_frames)
        shape = shape or found
        if found != shape or not record.prompt.strip():
            continue
        yield expand_rows(record, [], "", keep_original=True)[0]
        count -= 1
        if count == 0:
            return


def _planned(run: Resolved, rows: list[dict[str, Any]]) -> Planned:
    ids = sample_ids([row["prompt_id"] for row in rows], 0, run.generator_ids[0], run.plan_id)
    places = np.arange(len(rows))
    return Planned(places, texts(ids), np.zeros_like(places), pa.Table.from_pylist(rows, PLANNED), 0)
