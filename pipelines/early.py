"""Samples not worth finishing: by what they are scored, from when on, and what that loses.

The first samples of a dataset go to their end, with the score that they had part-way. Those of them that were accepted say
below which score a sample is stopped (see `pipelines.operating_point.by_loss`). From then on every batch carries that
threshold. A share of what would be stopped goes on, and measures what is lost.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from infra.tables import Table
from infra.telemetry import log
from models.early import KEY
from pipelines.decisions import in_commit_order
from pipelines.operating_point import CONFIDENCE, at_most, by_loss, least_for
from pipelines.resolve import Resolved
from stages.batch import STOPPED, Batch
from stages.early import BELOW, NAME

_HELD_OUT = '"held_out": true'


@dataclass(frozen=True)
class EarlyPoint:
    """A threshold that was found on `good` accepted samples of the first `samples`, of which it would lose `lost`."""

    loss: float
    threshold: float
    good: int
    samples: int
    lost: int

    def __str__(self) -> str:
        return (
            f"{KEY}: stops below {self.threshold:.4g}, found on {self.good} good of the first {self.samples} samples,"
            f" {self.lost} of which score lower: loses at most {self.loss:.2%} of the good ones ({CONFIDENCE:.0%})"
        )


@dataclass(frozen=True)
class Measured:
    """What was `stopped`, and of those `held_out`, which went on all the same, how many were `good`; `accepted` are all that
    were."""

    stopped: int
    held_out: int
    good: int
    accepted: int

    @property
    def lost(self) -> tuple[float, float] | None:
        """Share of the good samples that was lost, and its one-sided bound; None before anything was held out."""
        if not self.held_out:
            return None
        shares = (self.good / self.held_out, at_most(self.good, self.held_out))
        low, high = (self.stopped * share / max(1.0, self.accepted + self.stopped * share) for share in shares)
        return low, high

    def __str__(self) -> str:
        said = f"{KEY}: {self.stopped} stopped, {self.held_out} held out, {self.good} of them accepted"
        if self.lost is None:
            return said
        return f"{said}: {self.lost[0]:.2%} of the good samples lost, at most {self.lost[1]:.2%} ({CONFIDENCE:.0%})"


class EarlyGate:
    """The threshold of one run's batches, found while they are made where it was not found before."""

    def __init__(self, run: Resolved) -> None:
        self.run, self.point = run, find(run)
        self._looked = time.monotonic()

    def bounded(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Each batch with what its samples are stopped below, as it is known when it is asked for. Samples that are tried
        again are not stopped."""
        for batch in batches:
            yield {**batch, BELOW: np.where(batch["attempt"] > 1, -math.inf, self._below())}

    def as_told(self) -> dict[str, Any]:
        """What a run's row says of it."""
        return {"point": self.point and asdict(self.point), "measured": asdict(measured(self.run))}

    def _below(self) -> float:
        if self.point is None and time.monotonic() - self._looked >= self.run.spec.output.commit_every:
            self._looked, self.point = time.monotonic(), find(self.run)
            if self.point is not None:
                log().info("samples are stopped early from now on", **asdict(self.point))
        return -math.inf if self.point is None else self.point.threshold


def early_gate(run: Resolved) -> EarlyGate | None:
    return None if run.early is None else EarlyGate(run)


def find(run: Resolved) -> EarlyPoint | None:
    """The threshold of this judge, rubric and plan; None while there are not enough samples.

    It follows from the first ones in the order of commits, and so is the same for ever.
    """
    asked = run.spec.sampler.early_reject
    if asked is None:
        return None
    scores, samples = _calibrating(run, wanted := asked.calibration or least_for(asked.loss))
    if len(scores) < wanted or (found := by_loss(np.array(scores), asked.loss)) is None:
        return None
    return EarlyPoint(asked.loss, found[0], len(scores), samples, found[1])


def _calibrating(run: Resolved, wanted: int) -> tuple[list[float], int]:
    """Early scores of the first good samples, `wanted` or as many as there are, and how many samples it took."""
    assert run.early is not None
    mine = {"judge": run.judge_name, "rubric": run.rubric_id, "plan_id": run.plan.plan_id}
    columns = [*mine, "scores", "verdict", "extra_json"]
    good: list[float] = []
    samples = 0
    for row in in_commit_order(Table(run.storage, "samples"), columns=columns):
        if any(row[name] != value for name, value in mine.items()):
            continue
        said = json.loads(row["extra_json"] or "{}").get(NAME)
        if not isinstance(said, dict) or said.get("asked") != run.early.asked or "below" in said:
            continue
        score = next((each["value"] for each in row["scores"] or () if each["name"] == NAME), None)
        if score is None:
            continue
        samples += 1
        if row["verdict"] == "accepted":
            good.append(float(score))
            if len(good) == wanted:
                break
    return good, samples


def measured(run: Resolved) -> Measured:
    """What all runs of the dataset stopped, and what that lost."""
    stopped = {
        sample_id
        for batch in Table(run.storage, "failures").batches(["sample_id"], pc.field("error_type") == STOPPED)
        for sample_id in batch.column("sample_id").to_pylist()
    }
    held = pc.match_substring(pc.field("extra_json"), _HELD_OUT)
    samples = Table(run.storage, "samples").dataset()
    accepted = pc.field("verdict") == "accepted"
    return Measured(
        stopped=len(stopped),
        held_out=samples.count_rows(filter=held),
        good=samples.count_rows(filter=held & accepted),
        accepted=samples.count_rows(filter=accepted),
    )


def early_told(run: Resolved) -> list[str]:
    """Lines on the threshold and on what it has lost; none where nothing may be stopped."""
    asked = run.spec.sampler.early_reject
    if asked is None or run.early is None:
        return []
    if (point := find(run)) is None:
        wanted = asked.calibration or least_for(asked.loss)
        there = len(_calibrating(run, wanted)[0])
        return [f"{KEY}: nothing is stopped until {wanted} accepted samples have an early score; {there} have"]
    found = measured(run)
    return [str(point), *([str(found)] if found.stopped or found.held_out else [])]
