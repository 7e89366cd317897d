from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from infra.errors import UserError
from stages.actor import StageActor, pack, run_stage, unpack
from stages.batch import Batch, SampleError, jsons, size, texts


def _batch(count: int = 5) -> Batch:
    return {
        "sample_id": texts([f"{at:032x}" for at in range(count)]),
        "prompt": texts([f"prompt {at}" for at in range(count)]),
        "batch_index": np.zeros(count, np.int64),
        "value": np.arange(count, dtype=np.float32),
        **{name: texts([""] * count) for name in ("error_type", "error", "error_stage")},
    }


@dataclass(frozen=True)
class Double:
    """Adds `doubled` and `note`; raises for the prompts named."""

    raises: tuple[str, ...] = ()
    error: type[Exception] = RuntimeError

    name: ClassVar[str] = "double"
    reads: ClassVar[tuple[str, ...]] = ("value",)
    adds: ClassVar[tuple[str, ...]] = ("doubled", "note")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None: ...

    def __call__(self, batch: Batch) -> Batch:
        for prompt in batch["prompt"]:
            if prompt in self.raises:
                raise self.error(f"cannot do {prompt}")
        return {**batch, "doubled": batch["value"] * 2, "note": texts(["ok"] * size(batch))}


class Marked(SampleError):
    def __init__(self, message: str) -> None:
        super().__init__("marked", message)


def test_pack_and_unpack_keep_every_column() -> None:
    batch = _batch() | {"frames": np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8, 3), np.uint8)}
    found = unpack(pack(batch))
    assert found.keys() == batch.keys()
    for name, column in batch.items():
        assert found[name].dtype == column.dtype
        assert np.array_equal(found[name], column)
    assert pack(batch).num_rows == 1


def test_pack_does_not_hold_on_to_tensors() -> None:
    batch = {"frames": np.ones((2, 8), np.uint8), "latents": np.ones((2, 4), np.float32)}
    before = [sys.getrefcount(column) for column in batch.values()]
    pack(batch)
    assert [sys.getrefcount(column) for column in batch.values()] == before


@pytest.mark.parametrize("batch", [{}, {"fault": texts(["user: x"])}, {"empty": np.zeros((0, 3), np.float32)}])
def test_pack_takes_batches_without_tensors(batch: Batch) -> None:
    found = unpack(pack(batch))
    assert found.keys() == batch.keys()
    assert all(np.array_equal(found[name], batch[name]) for name in batch)


def test_a_stage_adds_columns_and_every_live_sample_shares_its_cost() -> None:
    batch, seconds = run_stage(Double(), _batch(), accelerators=2.0)
    assert batch["doubled"].tolist() == [0, 2, 4, 6, 8]
    costs = [json.loads(cost)[0] for cost in batch["cost"]]
    assert {cost["stage"] for cost in costs} == {"double"}
    assert sum(cost["accelerator_seconds"] for cost in costs) == pytest.approx(seconds)


@pytest.mark.parametrize(("error", "kind"), [(RuntimeError, "stage_error"), (Marked, "marked")])
@pytest.mark.parametrize(
    "culprits", [("prompt 0",), ("prompt 4",), ("prompt 1", "prompt 2"), tuple(f"prompt {i}" for i in range(5))]
)
def test_a_stage_that_raises_fails_only_the_culprits(
    error: type[Exception], kind: str, culprits: tuple[str, ...]
) -> None:
    batch, _ = run_stage(Double(culprits, error), _batch())
    failed = [prompt for prompt, found in zip(batch["prompt"], batch["error_type"], strict=True) if found]
    assert failed == list(culprits)
    assert {found for found in batch["error_type"] if found} == {kind}
    assert {found for found in batch["error_stage"] if found} == {"double"}
    for at, prompt in enumerate(batch["prompt"]):
        if prompt not in culprits:
            assert batch["doubled"][at] == 2 * at


def test_failed_and_rejected_samples_are_passed_over_and_kept() -> None:
    batch = _batch() | {"verdict": texts(["", "rejected", "", "accepted", ""])}
    batch["error_type"][0] = "empty_prompt"
    batch["error_stage"][0] = "encode"
    batch, _ = run_stage(Double(), batch)
    assert size(batch) == 5
    assert batch["doubled"].tolist() == [0, 0, 4, 6, 8]
    assert batch["note"].tolist() == ["", "", "ok", "ok", "ok"]
    assert batch["error_stage"][0] == "encode"


@pytest.mark.parametrize("error", [OSError, MemoryError, UserError])
def test_the_worlds_fault_is_nobodys_sample(error: type[Exception]) -> None:
    with pytest.raises(error):
        run_stage(Double(("prompt 3",), error), _batch())


def test_an_actor_tells_the_driver_of_a_fault_instead_of_raising() -> None:
    actor = StageActor("test", (Double(("prompt 3",), OSError),))
    batch = actor.run(_batch())
    assert set(batch) == {"batch_index", "fault"}
    assert batch["fault"][0].startswith("world: OSError")
    again = StageActor("next", (Double(),)).run(batch)
    assert again["fault"][0] == batch["fault"][0]


def test_an_actor_that_cannot_load_says_so_with_its_first_batch() -> None:
    @dataclass(frozen=True)
    class Broken(Double):
        def load(self) -> None:
            raise UserError("judge.model: /nowhere is missing; give a folder")

    batch = StageActor("test", (Broken(),)).run(_batch())
    assert batch["fault"][0] == "user: judge.model: /nowhere is missing; give a folder"


def test_the_ledger_accounts_for_all_of_an_actors_time() -> None:
    actor = StageActor("test", (Double(),), accelerators=1.0)
    for _ in range(3):
        batch = actor.run(_batch())
    (entry,) = json.loads(batch["ledger"][0])
    told = entry["boot_seconds"] + entry["load_seconds"] + entry["idle_seconds"] + entry["busy_seconds"]
    assert told == pytest.approx(entry["ended_at"] - entry["started_at"], rel=0.02, abs=0.05)
    assert entry["shared_seconds"] <= entry["busy_seconds"]


def test_an_actor_drops_what_nobody_needs_afterwards() -> None:
    batch = _batch() | {"cond.prompt_embeds": np.zeros((5, 4), np.float32)}
    assert not any(name.startswith("cond.") for name in StageActor("test", (Double(),), drop=("cond.",)).run(batch))


def test_a_written_batch_carries_its_ledger_in_the_result() -> None:
    @dataclass(frozen=True)
    class Write(Double):
        takes_failed: ClassVar[bool] = True

        def __call__(self, batch: Batch) -> Batch:
            return {"result": jsons([{"batch_index": 0, "ledger": []}])}

    batch = StageActor("test", (Double(), Write())).run(_batch())
    (entry,) = json.loads(batch["result"][0])["ledger"]
    first, second = entry["steps"]
    assert first["stage"] == second["stage"] == "double"
    assert entry["started_at"] <= first["began"] <= first["ended"] <= second["began"] <= second["ended"]
    assert first["accelerator_seconds"] == pytest.approx(entry["shared_seconds"])
    assert second["accelerator_seconds"] == 0  # a writer's is not shared over samples
