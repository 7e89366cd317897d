"""Models that look at media, wherever they run: in this process, in vLLM, or behind an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from models.endpoint import load_endpoint
from models.endpoint_client import EndpointRef
from models.multimodal import MultimodalRef, load_multimodal
from models.vllm import VllmRef, load_vllm

ViewerRef = MultimodalRef | VllmRef | EndpointRef


class Viewer(Protocol):
    """What judges and captions; see `models.multimodal.Multimodal` for what the methods take and give."""

    def p_yes(self, frames: np.ndarray, questions: list[list[str]]) -> np.ndarray: ...
    def answer(
        self, frames: np.ndarray, texts: list[list[str]], max_new_tokens: int, temperature: float = 0.0
    ) -> list[list[str]]: ...
    def structured(
        self,
        frames: np.ndarray,
        instruction: str,
        schema: Mapping[str, Any],
        max_new_tokens: int,
        temperature: float = 0.0,
    ) -> list[Any]: ...


def load_viewer(ref: ViewerRef, threads: int | None = None) -> Viewer:
    """The model of `ref`, loaded once for each process; with as many threads of torch, if it computes here.

    Raises UserError where the folder holds no such model, vLLM or its GPU is missing, or the
    endpoint's API key.
    """
    if isinstance(ref, EndpointRef):
        return load_endpoint(ref)
    if isinstance(ref, VllmRef):
        return load_vllm(ref)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return load_multimodal(ref)


def name_of(ref: ViewerRef) -> str:
    """Path of a model, or model@host of one behind an endpoint."""
    return ref.name if isinstance(ref, EndpointRef) else ref.path
