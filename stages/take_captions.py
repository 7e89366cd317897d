"""TakeCaptions: a source's own caption, taken over where the clip shows what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from models.multimodal import evenly_spaced
from models.pack.marks import marks
from models.viewer import ViewerRef, load_viewer
from stages.batch import Batch, jsons, load_json, size, texts
from stages.caption import VERIFY
from stages.rubric import PROMPT_CHARACTERS

STYLE = "source"
SCORE = "caption_match"


@dataclass(frozen=True)
class TakeCaptions:
    """Reads `frames`, `prompt` (the source's caption, empty where there is none), `captions` and `scores`; where the caption
    is supported it becomes `caption`, and the first of `captions`, of style `source`. Appends its P(yes) to `scores`, as
    `caption_match`.

    What is asked is what CaptionMedia asks of its own statements. Without a model and the oracle nothing is asked, and every
    caption is taken over.
    """

    model: ViewerRef | None
    oracle: bool = False
    least: float = 0.5
    num_frames: int = 8
    threads: int = 1

    name: ClassVar[str] = "captions"
    reads: ClassVar[tuple[str, ...]] = ("frames", "prompt", "captions", "scores")
    adds: ClassVar[tuple[str, ...]] = ("captions", "caption", "scores")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        if self.model is not None and not self.oracle and self.least:
            load_viewer(self.model, self.threads)

    def __call__(self, batch: Batch) -> Batch:
        count = size(batch)
        given = [str(text).strip() for text in batch["prompt"]]
        asked = np.array([bool(text) for text in given])
        p_yes = np.full(count, math.nan)
        if asked.any() and self.least and (self.oracle or self.model is not None):
            p_yes[asked] = self._ask(batch["frames"][asked], [text for text in given if text])
        captions = load_json(batch["captions"]) if "captions" in batch else [[] for _ in range(count)]
        scores = load_json(batch["scores"]) if "scores" in batch else [[] for _ in range(count)]
        first = [str(text) for text in batch["caption"]] if "caption" in batch else [""] * count
        for at, text in enumerate(given):
            if math.isfinite(p_yes[at]):
                scores[at] = [*scores[at], {"name": SCORE, "value": float(p_yes[at])}]
            if text and not p_yes[at] < self.least:
                taken = {"style": STYLE, "language": "", "scene": 0, "text": text, "model": ""}
                captions[at], first[at] = [taken, *captions[at]], text
        return {**batch, "captions": jsons(captions), "caption": texts(first), "scores": jsons(scores)}

    def _ask(self, frames: np.ndarray, given: list[str]) -> np.ndarray:
        if self.oracle:
            return np.array([_mark(clip, text) for clip, text in zip(frames, given, strict=True)])
        assert self.model is not None
        media = "video" if frames.shape[1] > 1 else "image"
        asked = [[VERIFY.format(media=media, statement=text[:PROMPT_CHARACTERS])] for text in given]
        return load_viewer(self.model).p_yes(evenly_spaced(frames, self.num_frames), asked)[:, 0]


def _mark(frames: np.ndarray, text: str) -> float:
    """What the oracle says; 0 of a caption that is not of its world."""
    try:
        return marks(frames, text)["prompt_match"]
    except ValueError:
        return 0.0
