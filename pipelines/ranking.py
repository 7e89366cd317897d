"""Which samples of a release are the best: by the weighted mean of their scores, or by one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from infra.errors import UserError
from infra.storage import Storage
from infra.tables import Table
from pipelines.idset import IdSet
from pipelines.operating_point import by_share
from pipelines.viewers import MODEL_BACKENDS
from stages.early import NAME
from stages.rubric import OVERALL, load_rubric, with_decomposed
from stages.score import MEASURED
from stages.screen import PREFIX

if TYPE_CHECKING:
    from pipelines.release import Snapshot

UNRANKED = -1.0
"""Where a sample has none of the scores: after all that have one."""


def rank_weights(storage: Storage) -> dict[str, float]:
    """Weights of scores by the rubric of the newest run; none where its judge has no rubric."""
    judge = _newest_judge(storage)
    if judge.get("backend", "transformers") not in (*MODEL_BACKENDS, "oracle") or not judge:
        return {}
    try:
        rubric = load_rubric(judge.get("rubric", "default"))
    except UserError as error:
        raise UserError(
            f"rank: the newest run's {error}; or give the weights of scores as `rank` in --rules"
        ) from error
    if decompose := judge.get("decompose"):
        rubric = with_decomposed(rubric, decompose["threshold"])
    return {question.name: question.weight for question in rubric.questions if question.weight}


def quality(scores: list[dict[str, Any]] | None, weights: Mapping[str, float]) -> float:
    """The weighted mean of the scores that have a weight, of the judge's alike where there are no weights. What the judge was
    not asked is the screen's answer."""
    own = _scores(scores)
    used = weights or {name: 1.0 for name in own if name not in (*MEASURED, NAME) and not name.startswith(PREFIX)}
    pairs = [(weight, own[name]) for name, weight in used.items() if name in own and np.isfinite(own[name])]
    total = sum(weight for weight, _ in pairs)
    return sum(weight * value for weight, value in pairs) / total if total else UNRANKED


def left_to_releases(storage: Storage) -> dict[str, float]:
    """Score -> share to keep, of the newest run's thresholds that each release finds for itself."""
    bars = _newest_judge(storage).get("thresholds") or {}
    return {
        name: bar["keep"] for name, bar in bars.items() if isinstance(bar, dict) and bar["keep"] and not bar["first"]
    }


def keep_best(
    snapshot: Snapshot, chosen: IdSet, keep: Mapping[str, float], weights: Mapping[str, float]
) -> tuple[IdSet, list[dict[str, Any]], int]:
    """Those of the chosen that are in each share to keep, what the shares came to, and how many others there are.

    A sample that lacks a score was not asked for it, and stays.
    """
    if not keep:
        return chosen, [], 0
    ids: list[str] = []
    columns: dict[str, list[float]] = {name: [] for name in keep}
    for batch, _ in snapshot.chosen(chosen, ["sample_id", "verdict", "scores", "media"]):
        for row in batch.select(["sample_id", "scores"]).to_pylist():
            own = _scores(row["scores"])
            if (found := quality(row["scores"], weights)) != UNRANKED:
                own.setdefault(OVERALL, found)
            ids.append(row["sample_id"])
            for name, values in columns.items():
                values.append(own.get(name, math.nan))
    stay, said = np.ones(len(ids), dtype=bool), []
    for name, share in keep.items():
        column = np.array(columns[name])
        known = np.isfinite(column)
        if not known.any():
            raise UserError(f"keep.{name}: no sample of this release has this score; name another, or leave it out")
        point = by_share(name, "", column[known], share)
        gone = known & (column < point.threshold)
        said.append({"score": name, "share": share, "threshold": point.threshold, "removed": int(gone.sum())})
        stay &= ~gone
    return IdSet([pa.array(np.array(ids)[stay])]), said, int((~stay).sum())


def _scores(scores: list[dict[str, Any]] | None) -> dict[str, float]:
    own = {item["name"]: item["value"] for item in scores or () if item["value"] is not None}
    return {name.removeprefix(PREFIX): value for name, value in own.items() if name.startswith(PREFIX)} | own


def _newest_judge(storage: Storage) -> dict[str, Any]:
    """Section `judge` of the newest run's spec."""
    rows = Table(storage, "runs").read(["spec_json", "created_at"]).to_pylist()
    newest = max(rows, key=lambda row: row["created_at"], default=None)
    return dict(json.loads(newest["spec_json"] or "{}").get("judge") or {}) if newest else {}
