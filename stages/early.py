"""What SampleLatents stops a sample by, part-way: what a model that judges says of its estimate (see models/early.py)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from infra.errors import UserError
from models.early import KEY, Early
from models.facts import Score
from models.viewer import ViewerRef, load_viewer
from stages.asking import ask
from stages.batch import STOPPED, Batch, jsons, load_json, size, take, texts
from stages.judge import import_call
from stages.rubric import Rubric

NAME = "early"
"""Of the score, of the column, and of what `extra_json` tells of it."""
BELOW = "early_below"
"""The column, float64 [n], that says below which score each sample is stopped; without it none is."""
SECONDS = "early_seconds"
"""The column, float64 [n], of what the look took of each sample; rows do not hold it."""
_HOLD_OUT = b"ditmill/early/v1\n"


@dataclass(frozen=True)
class EarlyReject:
    """Scores clips of estimates: with the mean of the rubric's answers by their weights, or with `call`, which is named as a
    judge's and gives one score. Higher is better.

    `at` and `frames` as `models.early.Early`. `hold_out`: the share of samples, by a hash of their id, that go on whatever
    they score. `asked` names all that a score depends on, for rows.
    """

    at: float
    frames: int
    asked: str
    rubric: Rubric
    model: ViewerRef | None = None
    call: str | None = None
    facts: Score = "mean"
    num_frames: int = 8
    hold_out: float = 0.02

    def load(self, threads: int) -> None:
        if self.call is not None:
            import_call(self.call, f"{KEY}.call")
        elif self.model is not None:
            load_viewer(self.model, threads)

    def watch(self, batch: Batch) -> Early:
        """What is to look at this batch. Reads `prompt` and what else questions quote, `sample_id` and, if there, BELOW."""
        count = size(batch)
        below = np.asarray(batch.get(BELOW, np.full(count, -math.inf)), dtype=np.float64)
        spared = np.array([is_held_out(str(each), self.hold_out) for each in batch["sample_id"]], dtype=bool)

        def look(clips: np.ndarray, start: int) -> np.ndarray:
            return self.scores(take(batch, np.arange(start, start + len(clips))) | {"frames": clips})

        return Early(self.at, self.frames, below, spared, look)

    def scores(self, batch: Batch) -> np.ndarray:
        """Of samples with `frames` of any number, float64 [n]; NaN where there is no answer."""
        if self.call is None:
            assert self.model is not None
            answers, _ = ask(self.rubric, self.model, batch, self.num_frames, self.facts)
            return np.array([self.rubric.overall(row) for row in answers], dtype=np.float64)
        found = import_call(self.call, f"{KEY}.call")(batch)
        if not isinstance(found, Mapping) or len(found) != 1:
            raise UserError(f"{KEY}.call: {self.call}: expected {{name: n floats}} with one name, found {found!r:.60}")
        (values,) = found.values()
        if np.shape(values) != (size(batch),):
            raise UserError(f"{KEY}.call: {self.call}: expected {size(batch)} floats, found shape {np.shape(values)}")
        return np.asarray(values, dtype=np.float64)

    def told(self, batch: Batch, early: Early, nfe: int) -> Batch:
        """The columns that a look leaves: its score among `scores`, `early` for rows, SECONDS, `nfe`, and the error of a
        sample that was stopped."""
        before = load_json(batch.get("scores", texts([""] * size(batch))))
        scored = np.isfinite(early.scores)
        scores = [
            old + ([{"name": NAME, "value": float(score)}] if has else [])
            for old, score, has in zip(before, early.scores, scored, strict=True)
        ]
        would = early.scores < early.below
        facts = [
            {
                "asked": self.asked,
                "step": early.step,
                **({"batch": int(rows)} if rows else {}),
                **({"below": float(bar)} if math.isfinite(bar) else {}),
                **({"held_out": True} if spared else {}),
            }
            for rows, bar, spared in zip(early.sizes, early.below, would & early.spared, strict=True)
        ]
        errors = [
            f"step {early.step}: score {score:.6g} < {bar:.6g}" if stopped else str(error)
            for score, bar, stopped, error in zip(early.scores, early.below, early.stopped, batch["error"], strict=True)
        ]
        return {
            "scores": jsons(scores),
            NAME: texts([json.dumps(each, sort_keys=True) for each in facts]),
            SECONDS: np.full(size(batch), early.seconds / size(batch)),
            "nfe": np.where(early.stopped, early.evaluations, nfe),
            "error": texts(errors),
            "error_type": texts(
                [STOPPED if each else str(was) for each, was in zip(early.stopped, batch["error_type"], strict=True)]
            ),
        }


def is_held_out(sample_id: str, share: float) -> bool:
    """Whether a sample goes on to measure what stopping loses: by its id alone, so that every run says the same."""
    digest = hashlib.blake2b(_HOLD_OUT + sample_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
