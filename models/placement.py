"""Where a language or multimodal model runs and in what precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_of(device: str) -> str:
    """`auto` is the accelerator where there is one, else the CPU."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str = "auto") -> str:
    """What a row says of where it was made: `cpu`, or the accelerator's name."""
    import torch

    place = device_of(device)
    return str(torch.cuda.get_device_name(place)) if place.startswith("cuda") else place


def dtype_of(dtype: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU."""
    import torch

    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return getattr(torch, dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers: they break a terminal's live line and a worker's log."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
