"""Stages that compute nothing, for `dataplane`: they add the columns that the real ones add, and a kilobyte of media."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.media import Encoded
from stages.batch import Batch, size, texts

SIDE = 18
"""Pixels. A picture of noise of this size is a PNG of about a kilobyte."""

NULL_MEDIA = Encoded(bytes(1024), "png", "image/png", "null")


@dataclass(frozen=True)
class NullEncode:
    name: ClassVar[str] = "null_encode"
    reads: ClassVar[tuple[str, ...]] = ("prompt",)
    adds: ClassVar[tuple[str, ...]] = ("cond.prompt_embeds",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        pass

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "cond.prompt_embeds": np.zeros((size(batch), 8, 8), np.float32)}


@dataclass(frozen=True)
class NullSample:
    name: ClassVar[str] = "null_sample"
    reads: ClassVar[tuple[str, ...]] = ("cond.prompt_embeds",)
    adds: ClassVar[tuple[str, ...]] = ("latents", "nfe", "plan_json")
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        pass

    def __call__(self, batch: Batch) -> Batch:
        count = size(batch)
        latents = np.zeros((count, 4, 4, 4), np.float32)
        return {**batch, "latents": latents, "nfe": np.ones(count, np.int64), "plan_json": texts(["{}"] * count)}


@dataclass(frozen=True)
class NullDecode:
    name: ClassVar[str] = "null_decode"
    reads: ClassVar[tuple[str, ...]] = ("latents",)
    adds: ClassVar[tuple[str, ...]] = ("frames",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        pass

    def __call__(self, batch: Batch) -> Batch:
        noise = np.random.default_rng(0).integers(0, 256, (size(batch), 1, SIDE, SIDE, 3), np.uint8)
        return {**batch, "frames": noise}


@dataclass(frozen=True)
class NullScore:
    name: ClassVar[str] = "null_score"
    reads: ClassVar[tuple[str, ...]] = ("frames",)
    adds: ClassVar[tuple[str, ...]] = ("scores", "verdict", "reasons")
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        pass

    def __call__(self, batch: Batch) -> Batch:
        count = size(batch)
        scores = _same([{"name": "sharpness", "value": 1.0}, {"name": "brightness", "value": 128.0}], count)
        return {**batch, "scores": scores, "verdict": texts(["accepted"] * count), "reasons": texts(["[]"] * count)}


@dataclass(frozen=True)
class NullJudge:
    name: ClassVar[str] = "null_judge"
    reads: ClassVar[tuple[str, ...]] = ("frames", "scores")
    adds: ClassVar[tuple[str, ...]] = ("scores",)
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        pass

    def __call__(self, batch: Batch) -> Batch:
        judged = [{"name": "sharpness", "value": 1.0}, {"name": "brightness", "value": 128.0}]
        judged += [{"name": name, "value": 0.9} for name in ("prompt_match", "no_artefacts")]
        return {**batch, "scores": _same(judged, size(batch))}


@dataclass(frozen=True)
class NullCaption:
    codec: str = "null"

    name: ClassVar[str] = "null_caption"
    reads: ClassVar[tuple[str, ...]] = ("frames",)
    adds: ClassVar[tuple[str, ...]] = ("captions", "caption")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        """A codec is a model as well: with `null`, what is written is a kilobyte that nobody compressed."""
        if self.codec == "null":
            import infra.media

            infra.media.encode = lambda *_: NULL_MEDIA

    def __call__(self, batch: Batch) -> Batch:
        caption = {"style": "short", "language": "en", "scene": 0, "text": "nothing to be seen", "model": "null"}
        count = size(batch)
        return {**batch, "captions": _same([caption], count), "caption": texts([caption["text"]] * count)}


def _same(value: Any, count: int) -> np.ndarray:
    return texts([json.dumps(value)] * count)
