"""Sampler groups in a run: the same latents as one process makes, and a rank that is killed costs time and nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from infra.errors import UserError
from infra.shard import read_safetensors
from infra.storage import Storage

if TYPE_CHECKING:
    from conftest import Runner

    from pipelines.generate import Progress

pytestmark = pytest.mark.ray


def _run(
    run: Runner,
    root: Path,
    parallel: dict[str, int],
    report: Any = lambda _: None,
    prompts: int = 10,
    tiles: bool = False,
    **keys: Any,
) -> dict[str, np.ndarray]:
    spec = run.spec(
        root,
        {"inline": [f"thing {at}" for at in range(prompts)]},
        layout={"batch_size": 2, "parallel": parallel, "vae_tiling": tiles},
        output={"uri": str(root), "commit_every": 0.1, "tensors": {"latents": "float32"}},
        **keys,
    )
    outcome = run(spec, report=report)
    run.check(root, outcome)
    assert outcome.status == "exhausted"
    return {row["sample_id"]: _latents(root, row) for row in run.rows(root, "samples")}


def _latents(root: Path, row: dict[str, Any]) -> np.ndarray:
    (item,) = (item for item in row["tensors"] if item["role"] == "latents")
    data = Storage(str(root)).read_bytes(item["shard"], item["offset"], item["offset"] + item["nbytes"])
    return read_safetensors(data, "latents")


@pytest.fixture(scope="module")
def alone(run: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return _run(run, tmp_path_factory.mktemp("alone"), {})


def _peers() -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if "_Peer" in " ".join(each.info["cmdline"] or ())]


def test_a_group_makes_what_one_process_makes(tmp_path: Path, run: Runner, alone: dict[str, np.ndarray]) -> None:
    made = _run(run, tmp_path / "data", {"cfg": 2, "vae": 2}, tiles=True)
    assert made.keys() == alone.keys() and len(made) == 10
    for name, latents in made.items():
        assert np.abs(latents - alone[name]).max() <= 1e-5 * np.abs(alone[name]).max()


def _kill_ranks(root: Path, run: Runner, times: int, prompts: int) -> dict[str, np.ndarray]:
    """A run of a group that loses a rank so many times, each time after two more samples."""
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        alive = [peer.pid for peer in _peers() if peer.pid not in killed]
        if len(killed) < times and progress.done >= 2 * (len(killed) + 1) and alive:
            killed.append(alive[0])
            os.kill(alive[0], signal.SIGKILL)

    made = _run(run, root, {"ulysses": 2}, kill, prompts=prompts)
    assert len(killed) == times
    return made


def test_a_rank_that_is_killed_again_and_again_costs_time_and_nothing_else(
    tmp_path: Path, run: Runner, alone: dict[str, np.ndarray]
) -> None:
    made = _kill_ranks(tmp_path / "data", run, times=3, prompts=10)
    assert made.keys() == alone.keys()
    for name, latents in made.items():
        assert np.abs(latents - alone[name]).max() <= 1e-5 * np.abs(alone[name]).max()


@pytest.mark.soak
def test_ten_killed_ranks(tmp_path: Path, run: Runner) -> None:
    assert len(_kill_ranks(tmp_path / "data", run, times=10, prompts=30)) == 30


def test_a_video_in_blocks_has_the_same_bits_by_one_stage_and_by_two(tmp_path: Path, run: Runner) -> None:
    keys: dict[str, Any] = {
        "sampler": {"num_inference_steps": 2, "dualparal": {"frames": 1, "context": 1}},
        "buckets": [{"height": 64, "width": 64, "num_frames": 17}],
    }
    one = _run(run, tmp_path / "one", {}, **keys)
    two = _run(run, tmp_path / "two", {"dualparal": 2}, **keys)
    assert one.keys() == two.keys() and len(one) == 10
    assert all(np.array_equal(latents, two[name]) for name, latents in one.items())


def test_degrees_that_do_not_fit_are_the_users_mistake(tmp_path: Path, run: Runner) -> None:
    with pytest.raises(UserError, match=r"layout\.parallel\.tensor: . heads cannot be shared by 7 ranks"):
        _run(run, tmp_path / "data", {"tensor": 7})
