"""When the ranks of a sampler group cannot go on together, and how it is told."""

from __future__ import annotations

import datetime

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
