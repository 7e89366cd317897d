"""What a judge has answered about stored samples: in their own rows, and in annotations."""

from __future__ import annotations

from typing import Any

from pipelines.decisions import read_scores
from pipelines.resolve import Resolved
from stages.early import NAME
from stages.score import MEASURED

SCORE = "score"
"""Who decides where a spec has no judge."""


class Answers:
    """Answers of the judge of `run`, its screen among it, to the questions that `run` asks."""

    columns: tuple[str, ...] = ("sample_id", "judge", "rubric", "scores")

    def __init__(self, run: Resolved) -> None:
        self._mine = (run.judge_name or SCORE, run.asked)
        self._annotated = read_scores(run.storage, *self._mine)

    def of(self, row: dict[str, Any]) -> dict[str, float]:
        """Question -> answer; none where another judge answered, or to something else. `row` has `columns`."""
        if (found := self._annotated.get(row["sample_id"])) is not None:
            return found
        if (row["judge"] or SCORE, asked(row)) != self._mine:
            return {}
        scores = row["scores"] or []
        scores = (
            scores[1:] if scores and scores[0]["name"] == NAME else scores
        )  # sampling comes before what is measured
        measured = next(
            (at for at, item in enumerate(scores) if item["name"] not in MEASURED[at : at + 1]), len(scores)
        )
        return {item["name"]: item["value"] for item in scores[measured:]}


def asked(row: dict[str, Any]) -> str:
    """What was asked of a row's judge, as `Resolved.asked`."""
    return str(row["rubric"] or "").rpartition("+")[0]
