"""Attention kernels by name. xfuser's own need a GPU: here its registry is stood in for by one that counts calls."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import UserError
from models.families import family_of
from models.generator import GeneratorRef
from models.parallel.attention import attend
from models.parallel.degrees import Degrees, check_attention
from models.parallel.kernels import kernel_of
from tests.models.parallel.ranks import on_ranks
from tests.models.parallel.test_layout import PLAN, _latents

BACKENDS = "xfuser.core.distributed.attention_backend"
NAMES = ("xfuser", "xfuser.core", "xfuser.core.distributed", "flash_attn")


def _stand_in() -> list[torch.Size]:
    """An xfuser on a machine with FlashAttention 2; what that was called with."""
    calls: list[torch.Size] = []

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool) -> Any:
        assert dropout_p == 0 and not is_causal
        calls.append(query.shape)
        return attend(query, key, value)

    module = ModuleType(BACKENDS)
    kinds = enum.Enum("AttentionBackendType", ["FLASH", "FLASH_3", "FLASH_4", "CUDNN"])  # type: ignore[misc]
    module.AttentionBackendType = kinds  # type: ignore[attr-defined]
    module.ATTENTION_FUNCTION_REGISTRY = {kinds.FLASH: flash}  # type: ignore[attr-defined]
    for name in NAMES:
        sys.modules[name] = ModuleType(name)
    sys.modules["flash_attn"].__spec__ = ModuleSpec("flash_attn", None)
    sys.modules[BACKENDS] = module
    return calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    for name in (*NAMES, BACKENDS):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # put back afterwards
    return _stand_in()


def test_a_kernel_that_cannot_be_had_is_refused_in_a_line(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"layout\.attention: flash_3 wants the package flash_attn_interface"):
        kernel_of("flash_3")
    monkeypatch.setitem(sys.modules, BACKENDS, None)  # as where it is not installed
    with pytest.raises(UserError, match=r"layout\.attention: flash is a kernel of xfuser.*ditmill\[gpu\]"):
        kernel_of("flash")
    with pytest.raises(UserError, match=r"layout\.attention: FLUX\.1 keeps its own attention, found flash"):
        check_attention(family_of("FluxPipeline"), "flash")
    check_attention(family_of("FluxPipeline"), "native")


def test_one_process_attends_by_the_kernel(calls: list[torch.Size], tiny_checkpoint: Callable[[str], str]):
    path = tiny_checkpoint("WanPipeline")
    wanted, _ = _latents(GeneratorRef(path))
    assert not calls
    made, _ = _latents(GeneratorRef(path, attention="flash"))
    assert calls and np.abs(made - wanted).max() <= 1e-5 * np.abs(wanted).max()


def _counted(ref: GeneratorRef) -> tuple[np.ndarray, int]:
    calls = _stand_in()
    return _latents(ref, PLAN)[0], len(calls)


@pytest.mark.parametrize("degrees", [Degrees(ring=2), Degrees(tensor=2)], ids=str)
def test_ranks_attend_by_the_kernel(degrees: Degrees, tiny_checkpoint: Callable[[str], str]):
    path = tiny_checkpoint("WanPipeline")
    wanted, _ = _latents(GeneratorRef(path))
    for made, calls in on_ranks(2, _counted, GeneratorRef(path, parallel=degrees, attention="flash")):
        assert calls and np.abs(made - wanted).max() <= 1e-5 * np.abs(wanted).max()
