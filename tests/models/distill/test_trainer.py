"""The trainer on real ranks: ZeRO 1, 2 and 3 with gloo train the same student, and a killed training ends bit for bit where
an uninterrupted one does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.ranks import Ended, run_ranks
from models.distill.trainer import TrainerConfig

pytest.importorskip("deepspeed")

REPO = Path(__file__).parents[3]
RANK = Path(__file__).parent / "rank.py"


def train(folder: Path, method: str, world: int = 2, killed_at: int | None = None, **config: Any) -> Ended:
    folder.mkdir(exist_ok=True)
    config = {"batch_size": 2, "checkpoint_steps": 2, "log_steps": 1, "learning_rate": 1e-3, "warmup_steps": 2} | config
    job = folder / "job.json"
    job.write_text(json.dumps({"method": method, "folder": str(folder), "killed_at": killed_at, "config": config}))
    path = {"PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return run_ranks([sys.executable, str(RANK), str(job)], world, lambda line: None, path)


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "weights.safetensors")


def test_zero_1_2_and_3_on_two_ranks_train_the_same_student(tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        ended = train(tmp_path / str(stage), "trajectory", zero=stage)
        assert ended.code == 0, ended.tail
    one, two, three = (weights(tmp_path / str(stage)) for stage in (1, 2, 3))
    assert sum("average/" in name for name in one) == sum("last/" in name for name in one) > 20
    assert any((one[name] != one[name.replace("last/", "average/")]).any() for name in one if "last/" in name)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-6)
        np.testing.assert_allclose(three[name], value, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "zero", "precision", "world"),
    [("consistency", 2, "float32", 2), ("reflow", 3, "bfloat16", 2), ("trajectory", 1, "autocast", 1)],
)
def test_a_killed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(
    tmp_path: Path, method: str, zero: int, precision: str, world: int
) -> None:
    settings = {"zero": zero, "precision": precision, "accumulate": 2, "world": world}
    whole = train(tmp_path / "whole", method, **settings)
    assert whole.code == 0, whole.tail
    killed_at = 3 + os.urandom(1)[0] % 4
    killed = train(tmp_path / "killed", method, killed_at=killed_at, **settings)
    assert killed.code == -9
    assert json.loads((tmp_path / "killed" / "state" / "latest.json").read_text())["step"] >= 2
    resumed = train(tmp_path / "killed", method, **settings)
    assert resumed.code == 0, resumed.tail
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    different = [name for name, value in expected.items() if not np.array_equal(value, found[name])]
    assert not different, f"killed before step {killed_at}"


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = TrainerConfig(learning_rate=2.0, warmup_steps=10, floor=0.1)
    assert config.rate(0, 110) == pytest.approx(0.2)
    assert config.rate(10, 110) == pytest.approx(2.0)
    assert config.rate(60, 110) == pytest.approx(2.0 * 0.55)
    assert config.rate(110, 110) == pytest.approx(0.2)
