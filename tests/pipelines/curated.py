"""A planted folder, curated by the stages of a run one after the other, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import indexing
from pipelines.placement import Group
from pipelines.resolve import Resolved, resolve_spec
from pipelines.spec import parse_spec
from stages.actor import run_stage
from stages.batch import Batch


class Hands:
    """What pipelines.feed.Feeder does, in this process. `opened` counts the files that were handed out; `most` ends it early,
    as a kill would."""

    opened = 0
    most: int | None = None

    def __init__(self, in_flight: int) -> None:
        self.in_flight, self.launched, self.closed = in_flight, 0, False
        self.batches: dict[int, Batch] = {}

    @property
    def has_room(self) -> bool:
        return not self.closed and len(self.batches) < self.in_flight

    def put(self, batch: Batch) -> None:
        batch["batch_index"][:] = self.launched
        self.batches[self.launched] = batch
        self.launched += 1
        Hands.opened += len(batch["sample_id"])

    def done(self, number: int) -> bool:
        return self.batches.pop(number, None) is not None

    def close(self) -> None:
        self.closed = True


def results(hands: Hands, groups: tuple[Group, ...], *_: object) -> Iterator[Batch]:
    yield {}
    while hands.batches:
        batch = next(iter(hands.batches.values()))
        for group in groups:
            for stage in group.stages:
                stage.load()
                batch, _ = run_stage(stage, batch)
        yield batch
        if Hands.most is not None and Hands.opened >= Hands.most:
            raise KeyboardInterrupt


def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing in this process."""
    monkeypatch.setattr(indexing, "Feeder", Hands)
    monkeypatch.setattr(indexing, "results", results)
    monkeypatch.setattr(Hands, "opened", 0)
    monkeypatch.setattr(Hands, "most", None)


def resolved(root: Path, sources: list[dict[str, Any]], **sections: Any) -> Resolved:
    """A run of a spec that looks with the oracle and writes no captions of its own."""
    spec = {
        "recipe": "curate",
        "sources": sources,
        "cut": {"detector": "none"},
        "layout": {"batch_size": 8},
        "score": {"min_brightness": 20, "max_flicker": 12, "min_motion": 0.01},
        "judge": {"backend": "none"},
        "caption": None,
        "output": {"uri": str(root), "commit_every": 0.001},
    }
    return resolve_spec(parse_spec({**spec, **sections}))


def one_group(run: Resolved) -> tuple[Group, ...]:
    return (Group("index", (indexing.indexing_of(run),), 1, 1.0, 0.0),)


def curate(run: Resolved) -> None:
    """All of a run's samples that the dataset lacks."""
    from infra.tables import Table
    from pipelines.commits import Commits
    from pipelines.enumeration import Batches
    from pipelines.idset import IdSet
    from pipelines.recipes import RECIPES
    from pipelines.run import expand, open_dataset
    from pipelines.run_rows import commit_run_row

    open_dataset(run)
    enumeration, _ = expand(run, lambda: one_group(run))
    ids = json.dumps({"generator_ids": run.generator_ids, "plan_id": run.plan_id})
    known = {"plan_file": enumeration.plan_file, "planned": len(enumeration), "extra_json": ids}
    commit_run_row(run, "started", status="running", **known)
    samples = Table(run.storage, "samples")
    done = IdSet(batch.column("sample_id") for batch in samples.batches(["sample_id"]))
    commits = Commits(run.storage, run.run_id, 0.0)
    recipe = RECIPES["curate"]
    todo = Batches(enumeration, lambda ids: done.contains(ids), run.spec.layout.batch_size, {}, run.spec.seed)
    for number, batch in enumerate(todo):
        batch["batch_index"] = np.full(len(batch["sample_id"]), number)
        for stage in (*recipe.generating(run), *recipe.judging(run)):
            stage.load()
            batch, _ = run_stage(stage, batch)
        commits.add(json.loads(batch["result"][0])["parts"])
        commits.commit(force=True)
    commit_run_row(run, "ended", status="exhausted", planned_through=len(enumeration), **known)
