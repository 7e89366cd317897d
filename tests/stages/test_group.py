"""When the ranks of a sampler group cannot go on together, and how it is told."""

from __future__ import annotations

import datetime
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from stages.group import disagreement, told
from tests.models.parallel.ranks import on_ranks


@pytest.mark.parametrize(
    ("outcomes", "why"),
    [
        (["", "", ""], ""),
        (["ValueError: no"] * 3, ""),  # the batch's own fault: every rank met it
        (["", "ValueError: no", ""], "some ranks failed and others did not; rank 1: ValueError: no"),
        (["", None, None], "rank 1, rank 2 did not end the batch within 30 s; rank 0: ended it"),
        (
            ["lost in recv: timed out", "lost: ActorDiedError"],
            "rank 0: lost in recv: timed out; rank 1: lost: ActorDiedError",
        ),
        (["lost in recv: x", "lost in recv: x"], "rank 0: lost in recv: x; rank 1: lost in recv: x"),
    ],
)
def test_ranks_that_cannot_go_on_together_are_named(outcomes, why):
    assert disagreement(outcomes) == why


def _waits_for_nothing() -> str:
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    try:
        if dist.get_rank() == 0:
            dist.recv(torch.empty(3), 1, group=group)
    except RuntimeError as error:
        return told(error)
    finally:
        dist.barrier()
    return ""


def test_a_collective_that_times_out_is_named():
    first, second = on_ranks(2, _waits_for_nothing)
    assert first.startswith("lost in recv: ")
    assert second == ""
    assert told(ValueError("a\nb")) == "ValueError: a b"


@pytest.mark.ray
def test_a_group_that_spans_two_raylets_gives_the_same_latents(tmp_path: Path, tiny_pack: Path, planned):
    from models.generator import GeneratorRef
    from stages.encode import EncodeText
    from stages.sample import SampleLatents
    from tests.stages.two_nodes import PLAN

    folder = str(tiny_pack / "generator")
    refs = (GeneratorRef(folder),)
    batch = EncodeText(refs, PLAN, 2)(planned(2))
    (tmp_path / "batch.pickle").write_bytes(pickle.dumps(batch))
    command = [sys.executable, "-m", "tests.stages.two_nodes", str(tmp_path / "batch.pickle"), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(json.loads(done.stdout.splitlines()[-1]))) == 2
    alone = SampleLatents(refs, PLAN, 2)(batch)["latents"]
    np.testing.assert_allclose(np.load(tmp_path / "batch.npy"), alone, rtol=0, atol=1e-5 * np.abs(alone).max())
