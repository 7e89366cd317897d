from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.storage import Storage
from pipelines.enumeration import PLANNED, Batches, Enumeration
from pipelines.identity import Shape, prompt_id
from stages.batch import size

SHAPES = (Shape(64, 64, 17, 8.0), Shape(32, 32, 1, 1.0))


def _enumeration(root: Path, prompts: int = 10, samples_per_prompt: int = 3, generators: int = 2) -> Enumeration:
    rows = []
    for at in range(prompts):
        shape = SHAPES[at % 3 == 2]
        rows.append(
            {
                "prompt_id": prompt_id(f"prompt {at}", shape=shape, seed=0),
                "source_prompt": f"prompt {at}",
                "prompt": f"prompt {at}",
                "variant": 0,
                "height": shape.height,
                "width": shape.width,
                "num_frames": shape.num_frames,
                "fps": shape.fps,
                "seed": 7 if at == 0 else None,
            }
        )
    storage = Storage(str(root))
    (root / "plans").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, PLANNED), root / "plans" / "p.parquet")
    return Enumeration(storage, "plans/p.parquet", samples_per_prompt, tuple("ab"[:generators]), "plan")


def _none(ids: list[str]) -> np.ndarray:
    return np.zeros(len(ids), bool)


def _batches(enumeration: Enumeration, **changed: object) -> Batches:
    settings = {"is_done": _none, "batch_size": 4, "attempts": {}, "seed": 0} | changed
    return Batches(enumeration, **settings)  # type: ignore[arg-type]


def test_enumeration_plans_each_prompt_index_and_generator_once(tmp_path: Path) -> None:
    enumeration = _enumeration(tmp_path)
    ids = [sample_id for chunk in enumeration.chunks() for sample_id in chunk.sample_ids]
    assert len(ids) == len(enumeration) == 10 * 3 * 2
    assert len(set(ids)) == len(ids)


def test_enumeration_with_more_samples_per_prompt_keeps_its_prefix(tmp_path: Path) -> None:
    few = [i for chunk in _enumeration(tmp_path, samples_per_prompt=2).chunks() for i in chunk.sample_ids]
    more = [i for chunk in _enumeration(tmp_path, samples_per_prompt=3).chunks() for i in chunk.sample_ids]
    assert more[: len(few)] == few


def test_batches_hold_one_generator_and_one_shape_and_miss_nothing(tmp_path: Path) -> None:
    batches = _batches(_enumeration(tmp_path))
    made = list(batches)
    for batch in made:
        for name in ("generator", "height", "width", "num_frames"):
            assert len(set(batch[name])) == 1
        assert 1 <= size(batch) <= 4
    assert sum(map(size, made)) == 60
    assert len({sample_id for batch in made for sample_id in batch["sample_id"]}) == 60
    assert batches.planned_through == 60


def test_batches_leave_out_what_is_done(tmp_path: Path) -> None:
    enumeration = _enumeration(tmp_path)
    ids = [sample_id for chunk in enumeration.chunks() for sample_id in chunk.sample_ids]
    done = set(ids[::3])
    batches = _batches(enumeration, is_done=lambda found: np.array([i in done for i in found]))
    made = {sample_id for batch in batches for sample_id in batch["sample_id"]}
    assert made == set(ids) - done


def test_batches_take_a_prefix(tmp_path: Path) -> None:
    enumeration = _enumeration(tmp_path)
    ids = [sample_id for chunk in enumeration.chunks() for sample_id in chunk.sample_ids]
    batches = _batches(enumeration, limit=23)
    made = {sample_id for batch in batches for sample_id in batch["sample_id"]}
    assert made == set(ids[:23])
    assert batches.planned_through == 23


def test_planned_through_stops_before_what_waits_for_a_full_batch(tmp_path: Path) -> None:
    enumeration = _enumeration(tmp_path, generators=1)
    ids = [sample_id for chunk in enumeration.chunks() for sample_id in chunk.sample_ids]
    batches = _batches(enumeration)
    first = next(iter(batches))
    handed = set(first["sample_id"])
    assert batches.planned_through < len(ids)
    assert set(ids[: batches.planned_through]) <= handed


def test_a_sample_keeps_its_noise_whatever_its_batch(tmp_path: Path) -> None:
    enumeration = _enumeration(tmp_path)
    keys = []
    for batch_size in (1, 5, 100):
        found = {}
        for batch in _batches(enumeration, batch_size=batch_size):
            found |= dict(zip(batch["sample_id"], batch["noise_key"], strict=True))
        keys.append(found)
    assert keys[0] == keys[1] == keys[2]


def test_two_generators_start_from_the_same_noise(tmp_path: Path) -> None:
    by_generator: dict[int, set[str]] = {0: set(), 1: set()}
    for batch in _batches(_enumeration(tmp_path)):
        by_generator[int(batch["generator"][0])] |= set(batch["noise_key"])
    assert by_generator[0] == by_generator[1]


@pytest.mark.parametrize(("seed", "differs"), [(0, False), (1, True)])
def test_the_seed_enters_noise_unless_the_record_has_its_own(tmp_path: Path, seed: int, differs: bool) -> None:
    enumeration = _enumeration(tmp_path, samples_per_prompt=1, generators=1)
    before = {i: k for b in _batches(enumeration) for i, k in zip(b["sample_id"], b["noise_key"], strict=True)}
    after = {
        i: k for b in _batches(enumeration, seed=seed) for i, k in zip(b["sample_id"], b["noise_key"], strict=True)
    }
    changed = sum(before[i] != after[i] for i in before)
    assert changed == (9 if differs else 0)
