"""A pipeline's denoisers laid out over the ranks of a group: every rank makes the same call and gets the same latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.families import DENOISERS
from models.parallel.attention import Split
from models.parallel.degrees import Attention, Degrees, build_mesh
from models.parallel.guidance import GuidanceParallel
from models.parallel.kernels import kernel_of
from models.parallel.tensor import is_split, load_split, split_tensors
from models.parallel.wan import split_sequence

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layout:
    """What a rank must know of its group while it samples."""

    branches: Any = None
    """The ranks that evaluate the two branches of guidance."""
    tensor: Any = None
    """The ranks that share each matrix."""
    stages: Any = None
    """The ranks of DualParal's pipeline."""
    split: Split = field(default_factory=Split)
    """The ranks that share a sequence."""

    @contextmanager
    def sampling(self, pipe: Any, arguments: dict[str, Any]) -> Iterator[None]:
        """Around one call of the pipeline with these arguments."""
        if self.branches is None:
            yield
            return
        branches = (arguments["prompt_embeds"], arguments["negative_prompt_embeds"])
        denoisers = denoisers_of(pipe)
        try:
            for denoiser in denoisers:
                denoiser.forward = GuidanceParallel(denoiser.forward, branches, self.branches)
            yield
        finally:
            for denoiser in denoisers:
                del denoiser.forward


def lay_out(
    pipe: Any,
    degrees: Degrees,
    *,
    in_blocks: bool = False,
    device: str = "cpu",
    attention: Attention = "native",
) -> Layout:
    """Cut the denoisers of `pipe` for this rank. Each rank of the default process group calls it with the same arguments.

    `in_blocks`: DualParal samples, which cuts layers and sequence itself. What `load_parts` loaded is cut already. One
    rank needs no process group.
    """
    kernel = kernel_of(attention)
    if degrees.size == 1:
        split = Split(attend=kernel)
        if attention != "native" and not in_blocks:
            for denoiser in denoisers_of(pipe):
                split_sequence(denoiser, split)
        return Layout(split=split)
    mesh = build_mesh(degrees, device)
    split = Split(ring=mesh["ring"].get_group(), ulysses=mesh["ulysses"].get_group(), attend=kernel)
    for denoiser in denoisers_of(pipe):
        if degrees.tensor > 1 and not is_split(denoiser):
            split_tensors(denoiser, mesh["tensor"])
        if (split.parts > 1 or attention != "native") and not in_blocks:
            split_sequence(denoiser, split)
    return Layout(
        branches=mesh["cfg"].get_group() if degrees.cfg > 1 else None,
        tensor=mesh["tensor"].get_group() if degrees.tensor > 1 else None,
        stages=mesh["dualparal"].get_group() if degrees.dualparal > 1 else None,
        split=split,
    )


def load_parts(pipe: Any, folders: Mapping[str, Path], degrees: Degrees, device: str, dtype: torch.dtype) -> None:
    """Give `pipe` the denoisers in `folders`, by name, of which this rank loads its own part of tensor parallel alone."""
    mesh = build_mesh(degrees, device)["tensor"]
    for name, folder in folders.items():
        setattr(pipe, name, load_split(folder, mesh, dtype).to(device))


def denoisers_of(pipe: Any) -> list[Any]:
    return [denoiser for name in DENOISERS if (denoiser := getattr(pipe, name, None)) is not None]
