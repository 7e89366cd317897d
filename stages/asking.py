"""What a judge is asked about a sample, question by question, and what its answers score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.facts import Fact, Score, score_of
from models.multimodal import evenly_spaced
from models.viewer import ViewerRef, load_viewer
from stages.batch import Batch
from stages.rubric import DECOMPOSED, Rubric, media_of, parts_of


@dataclass(frozen=True)
class Sheet:
    """The questions of one sample: a text for each of `names`, then one for each of the prompt's facts, if they are asked."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    facts: tuple[Fact, ...] = ()

    def scores(self, p_yes: Sequence[float], how: Score) -> dict[str, float]:
        """Each question's score, that of the facts as `how` says. What follows the answers to `texts` in `p_yes` is none."""
        scores = {name: float(p) for name, p in zip(self.names, p_yes, strict=False)}
        return scores | ({DECOMPOSED: score_of(self._of_facts(p_yes), self.facts, how)} if self.facts else {})

    def answered(self, p_yes: Sequence[float]) -> list[dict[str, Any]]:
        """The facts with their answers, None where one is no number."""
        return [
            {"question": fact.question, "needs": list(fact.needs), "p_yes": p if math.isfinite(p) else None}
            for fact, p in zip(self.facts, self._of_facts(p_yes), strict=True)
        ]

    def _of_facts(self, p_yes: Sequence[float]) -> list[float]:
        return [float(p) for p in p_yes[len(self.names) : len(self.texts)]]


Known = Sequence[Mapping[str, float]]
"""What is known of each sample: P(yes) by a question's name."""


def ask(
    rubric: Rubric, model: ViewerRef, batch: Batch, num_frames: int, how: Score, known: Known | None = None
) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
    """Each sample's score for each question that it is asked, and the facts of its prompt with their answers, if it is asked
    about them. `model` is shown at most `num_frames` of the `frames`, and not asked again what it has answered: `known`."""
    sheets = sheets_of(rubric, batch)
    shown = evenly_spaced(batch["frames"], num_frames)
    rows = list(zip(sheets, _completed(model, shown, sheets, known or [{}] * len(sheets)), strict=True))
    return [sheet.scores(row, how) for sheet, row in rows], [sheet.answered(row) for sheet, row in rows]


def _completed(model: ViewerRef, shown: np.ndarray, sheets: list[Sheet], known: Known) -> list[list[float]]:
    """P(yes) for each text of each sheet: as it is known, or as the model answers."""
    answers = [
        [said.get(name, math.nan) for name in sheet.names] + [math.nan] * len(sheet.facts)
        for sheet, said in zip(sheets, known, strict=True)
    ]
    missing = [[at for at, p in enumerate(row) if math.isnan(p)] for row in answers]
    asked = [[sheet.texts[at] for at in places] for sheet, places in zip(sheets, missing, strict=True)]
    for row, places, p_yes in zip(answers, missing, load_viewer(model).p_yes(shown, asked), strict=True):
        for at, p in zip(places, p_yes.tolist(), strict=False):  # rows of p_yes are filled up
            row[at] = p
    return answers


def sheets_of(rubric: Rubric, batch: Batch) -> list[Sheet]:
    """What each sample of a batch is asked: a question whose parts its record lacks is not.

    Question `decomposed` is asked in the parts that column `decomposed` holds, or as a whole where it holds none.
    """
    num_frames = batch["frames"].shape[1]
    parts = parts_in(batch, rubric)
    facts = batch.get("decomposed", [""] * len(parts))
    return [
        _sheet(rubric, str(prompt), num_frames, each, str(found or ""))
        for prompt, each, found in zip(batch["prompt"], parts, facts, strict=True)
    ]


def _sheet(rubric: Rubric, prompt: str, num_frames: int, parts: Mapping[str, str], decomposed: str) -> Sheet:
    asked = [question for question in rubric.questions if question.asked(num_frames, parts)]
    plain = [question for question in asked if question.name != DECOMPOSED]
    texts = [question.format(prompt, num_frames, parts) for question in plain]
    facts: tuple[Fact, ...] = ()
    if (whole := next((question for question in asked if question.name == DECOMPOSED), None)) is not None:
        found = json.loads(decomposed) if decomposed else []
        media = media_of(num_frames)
        facts = tuple(Fact(fact["question"].replace("{media}", media), tuple(fact["needs"])) for fact in found)
        facts = facts or (Fact(whole.format(prompt, num_frames, parts)),)
    names = tuple(question.name for question in plain)
    return Sheet(names, (*texts, *(fact.question for fact in facts)), facts)


def parts_in(batch: Batch, rubric: Rubric) -> list[dict[str, str]]:
    """What questions may quote of each sample's record beside its prompt; nothing, where none of the rubric's does."""
    if not any(question.takes for question in rubric.questions):
        return [{}] * len(batch["prompt"])
    blank = [""] * len(batch["prompt"])
    columns = [batch.get(name, blank) for name in ("negative_prompt", "tags", "extra")]
    return [
        parts_of(str(negative or ""), json.loads(tags or "[]"), json.loads(extra or "{}"))
        for negative, tags, extra in zip(*columns, strict=True)
    ]
