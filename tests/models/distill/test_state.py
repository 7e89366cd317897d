"""Which states are kept, and which a training may go on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from infra.errors import UserError
from models.distill.state import States


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


AVERAGE: Any = SimpleNamespace(parts=[torch.zeros(2)])


class Engine:
    """What is asked of DeepSpeed's."""

    device = torch.device("cpu")

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        Path(folder, tag).mkdir()

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, None]:
        return (tag if Path(folder, tag).is_dir() else None), None


def found(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_the_newest_two_states_are_kept_whatever_killed_attempts_have_left(tmp_path: Path) -> None:
    states = States(tmp_path)
    assert states.latest() is None
    states.save(1, Engine(), AVERAGE, None)
    for killed in (5, 7, 9):  # while they saved: latest.json does not name them
        (tmp_path / f"step-{killed:08d}").mkdir()
    states.save(2, Engine(), AVERAGE, None)
    assert (states.latest(), found(tmp_path)) == (2, ["step-00000001", "step-00000002"])
    states.save(3, Engine(), AVERAGE, None)
    assert (states.latest(), found(tmp_path)) == (3, ["step-00000002", "step-00000003"])
    states.load(3, Engine(), AVERAGE, None)


def test_a_state_of_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.save(1, Engine(), AVERAGE, None)
    (tmp_path / "latest.json").write_text(json.dumps({"step": 1, "world": 2}))
    with pytest.raises(UserError, match=r"^deepspeed\.ranks: .*written by 2, found 1"):
        states.load(1, Engine(), AVERAGE, None)
