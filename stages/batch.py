"""What passes between stages: a batch of samples as columns.

A `Batch` is a dict of equally long numpy columns, one entry a sample. Text and nested values are `object` columns (nested
ones hold JSON, so that no Arrow type ever depends on the data); tensors are dense arrays whose first axis is the sample.
All samples of a batch share generator, height, width and num_frames.

Columns that a planned sample starts with:

    sample_id, noise_key, prompt_id, source_prompt, prompt, negative_prompt, licence: str
    inputs: str, JSON list of {role, uri, sha256, start, end};   tags: str, JSON list;   extra: str, JSON object
    sample_index, seed, height, width, num_frames, attempt, generator (its index in the spec): int64;   fps: float64
    error_type, error, error_stage: str, empty while the sample is well

and that stages add:

    cond.<name>   EncodeText: prompt_embeds and what else the family wants, float32 or bfloat16 bits as float32
    latents       SampleLatents: [n, channels, frames, height, width] (images: no frames axis), float32;   nfe: int64
    accelerated   SampleLatents, of a plan with techniques: JSON object, what they saved
    early         SampleLatents, where samples may be stopped: JSON object, how it was looked at; its score is among `scores`
    frames        DecodeLatents: [n, num_frames, height, width, 3], uint8
    scores        ScoreMedia, JudgeQuality: JSON list of {name, value}
    verdict       'accepted' or 'rejected';   reasons: JSON list of str
    captions      CaptionMedia: JSON list of {style, language, scene, text, model}, scene 0 being the whole; caption: str, the
                  first text of the whole
    cost          the stage actor: JSON list of {stage, accelerator_seconds, cpu_seconds}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]

STOPPED = "early"
"""The `error_type` of a sample that was not worth finishing. It counts as rejected, and not as failed."""


class Stage(Protocol):
    """One step of a sample's way: a frozen dataclass of settings, called with a batch, returning it with more columns.

    It never sees a failed sample and never drops one. It marks a sample as failed by filling `error_type` and `error`;
    what it raises is the whole batch's trouble, and its actor then finds the culprit.
    """

    @property
    def name(self) -> str: ...
    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def adds(self) -> tuple[str, ...]: ...
    @property
    def skips_rejected(self) -> bool: ...

    def load(self) -> None:
        """Load what the stage computes with, once for each process; calling it again costs nothing."""

    def __call__(self, batch: Batch) -> Batch: ...


@dataclass(frozen=True)
class HoldsStage:
    """What stands for the stage that it holds, run in another way: it reads and adds the same."""

    stage: Stage

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def reads(self) -> tuple[str, ...]:
        return self.stage.reads

    @property
    def adds(self) -> tuple[str, ...]:
        return self.stage.adds

    @property
    def skips_rejected(self) -> bool:
        return self.stage.skips_rejected


class WorldFault(Exception):
    """Nobody's sample is to blame (storage is down, no memory is left): the batch is to be tried again as it is."""


class SampleError(Exception):
    """The sample is to blame. `error_type` is a short snake_case name that users filter failures by."""

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type


def size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def take(batch: Batch, index: np.ndarray) -> Batch:
    """The samples at `index` (an integer or boolean array), in that order."""
    return {name: column[index] for name, column in batch.items()}


def texts(values: list[str]) -> np.ndarray:
    """A text column. numpy would make a fixed-width one, which truncates on assignment."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def column(batch: Batch, name: str) -> np.ndarray:
    """A copy of a text column, to be changed; empty texts where the batch has none."""
    return batch[name].copy() if name in batch else texts([""] * size(batch))


def jsons(values: list[Any]) -> np.ndarray:
    """A column of nested values, as JSON."""
    return texts([json.dumps(value, ensure_ascii=False) for value in values])


def load_json(column: np.ndarray) -> list[Any]:
    """The values of a JSON column; an empty text is an empty list."""
    return [json.loads(value) if value else [] for value in column]
