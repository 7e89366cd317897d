"""Guidance parallel: the two branches of classifier-free guidance on the two halves of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class GuidanceParallel:
    """Answers a pipeline that asks its denoiser for one branch after the other; each half evaluates one, at the same time.

    The pipeline calls the denoiser with the conditional embeddings, then with the unconditional ones, all else being equal.
    At the first call this half evaluates its own branch and the halves exchange; the second is answered from what came.

    Args:
        denoise: the denoiser's forward.
        branches: embeddings of the conditional and of the unconditional prompt, each [n, tokens, width].
        group: one rank of either half; rank 0 has the conditional branch.
    """

    def __init__(
        self, denoise: Callable[..., Any], branches: tuple[torch.Tensor, torch.Tensor], group: dist.ProcessGroup
    ) -> None:
        self.denoise, self.branches, self.group = denoise, branches, group
        self.evaluations = 0
        self._other: torch.Tensor | None = None

    def __call__(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor]:
        if self._other is not None:
            answer, self._other = self._other, None
            return (answer,)
        arguments |= {"encoder_hidden_states": self.branches[dist.get_rank(self.group)], "return_dict": False}
        own = self.denoise(hidden_states=hidden_states, timestep=timestep, **arguments)[0].contiguous()
        self.evaluations += 1
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own, group=self.group)
        self._other = both[1]
        return (both[0],)
