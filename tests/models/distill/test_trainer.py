"""The trainer on real ranks: ZeRO 1, 2 and 3 with gloo train the same student, and a killed training ends bit for bit where
an uninterrupted one does."""

from __future__ import annotations

import json
import os
import signal
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


JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-1": ("trajectory", {"zero": 1}),
    "zero-2": ("trajectory", {"zero": 2}),
    "zero-3": ("trajectory", {"zero": 3}),
    "consistency": ("consistency", {"zero": 2, "accumulate": 2}),
    "distribution": ("distribution", {"zero": 2, "accumulate": 2}),
    "distribution-3": ("distribution", {"zero": 3, "accumulate": 2}),
    "reflow": ("reflow", {"zero": 3, "precision": "bfloat16", "accumulate": 2}),
}
SETTINGS = {"batch_size": 2, "checkpoint_steps": 2, "log_steps": 1, "learning_rate": 1e-3, "warmup_steps": 2}


def train(folder: Path, *names: str, killed_at: int | None = None) -> Ended:
    """These jobs, one after the other, on two ranks."""
    jobs: list[str] = []
    for name in names:
        method, config = JOBS[name]
        (folder / name).mkdir(exist_ok=True)
        path = folder / f"{name}.json"
        job = {"method": method, "folder": str(folder / name), "killed_at": killed_at, "config": SETTINGS | config}
        path.write_text(json.dumps(job))
        jobs.append(str(path))
    environment = {"PYTHONPATH": str(REPO), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return run_ranks([sys.executable, str(RANK), *jobs], 2, lambda line: None, environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    ended = train(folder, *JOBS)
    assert ended.code == 0, ended.tail
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "weights.safetensors")


def test_zero_1_2_and_3_on_two_ranks_train_the_same_student(whole: Path) -> None:
    one, two, three = (weights(whole / f"zero-{stage}") for stage in (1, 2, 3))
    assert sum("average/" in name for name in one) == sum("last/" in name for name in one) > 20
    assert any((one[name] != one[name.replace("last/", "average/")]).any() for name in one if "last/" in name)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-6)
        np.testing.assert_allclose(three[name], value, atol=1e-5)


def test_distribution_matching_trains_student_and_critic_alike_whatever_zero_divides(whole: Path) -> None:
    two, three = weights(whole / "distribution"), weights(whole / "distribution-3")
    for name, value in two.items():
        np.testing.assert_allclose(three[name], value, atol=1e-5)


def test_killed_trainings_end_bit_for_bit_where_uninterrupted_ones_do(whole: Path, tmp_path: Path) -> None:
    names = ("consistency", "distribution", "reflow")
    for name in names:
        killed = train(tmp_path, name, killed_at=3 + os.urandom(1)[0] % 4)
        assert killed.code == -signal.SIGKILL, killed.tail
        assert json.loads((tmp_path / name / "state" / "latest.json").read_text())["step"] in (2, 4, 6)
        assert not (tmp_path / name / "weights.safetensors").exists()
    resumed = train(tmp_path, *names)
    assert resumed.code == 0, resumed.tail
    for name in names:
        expected, found = weights(whole / name), weights(tmp_path / name)
        assert expected.keys() == found.keys()
        assert not [weight for weight, value in expected.items() if not np.array_equal(value, found[weight])], name


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = TrainerConfig(learning_rate=2.0, warmup_steps=10, floor=0.1)
    assert config.rate(0, 110) == pytest.approx(0.2)
    assert config.rate(10, 110) == pytest.approx(2.0)
    assert config.rate(60, 110) == pytest.approx(2.0 * 0.55)
    assert config.rate(110, 110) == pytest.approx(0.2)
