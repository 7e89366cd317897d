"""Run a function on several ranks over gloo, and get what each returned."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on each of `count` ranks of a gloo group, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        # Forked, because importing torch and diffusers takes longer than any test.
        torch.multiprocessing.start_processes(_rank, (count, folder, function, args), count, start_method="fork")
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def _rank(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        found = function(*args)
        (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()
