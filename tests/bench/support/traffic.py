"""How many bytes a rank hands to its neighbours, counted at torch's own collectives, whoever calls them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Bytes sent by kind of collective while it is entered, after each one's textbook algorithm.

    With P ranks: an all-reduce sends 2 (P - 1) / P of its tensor (ring), an all-gather P - 1 times its part, an all-to-all
    (P - 1) / P of its tensor, a send all of it.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        p = ranks
        self._share = {
            "send": 1.0,
            "allgather_": p - 1.0,
            "_allgather_base_": p - 1.0,
            "all_gather_into_tensor": p - 1.0,
            "alltoall_base_": (p - 1) / p,
            "alltoall_": (p - 1) / p,
            "all_to_all_single": (p - 1) / p,
            "allreduce_": 2 * (p - 1) / p,
            "all_reduce": 2 * (p - 1) / p,
            "reduce_scatter_tensor": (p - 1) / p,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name in self._share:
                self.sent[name] += int(self._share[name] * _bytes(_input(name, args)))
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.sent.values())


def _input(name: str, args: tuple[Any, ...]) -> Any:
    """What a rank puts in: second where outputs come first."""
    return args[1] if name in ("allgather_", "_allgather_base_", "alltoall_base_", "alltoall_") else args[0]


def _bytes(found: Any) -> int:
    if isinstance(found, torch.Tensor):
        return found.numel() * found.element_size()
    return sum(_bytes(each) for each in found) if isinstance(found, list | tuple) else 0
