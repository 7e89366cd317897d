"""Attention kernels of xfuser (FlashAttention 2 to 4, cuDNN), behind the same function as torch's own: GPU only.

Of xfuser's 40 backends those are named that compute what torch computes, and return the log-sum-exp that a ring needs; the
quantised and the sparse ones change the result and belong to a sampler plan.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from infra.errors import UserError
from models.parallel.attention import Kernel, attend
from models.parallel.degrees import ATTENTION, Attention

_PACKAGES = {"flash": "flash_attn", "flash_3": "flash_attn_interface", "flash_4": "flash_attn"}
"""What brings the kernel. xfuser knows every kernel's name, and fails at the first call where this is missing."""


def kernel_of(attention: Attention) -> Kernel:
    """The attention function of this name; a UserError where xfuser, or the package behind it, is not there."""
    if attention == "native":
        return attend
    try:
        from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType
    except (ImportError, NotImplementedError) as error:  # the second is what xfuser raises where there is no GPU
        raise UserError(
            f"{ATTENTION}: {attention} is a kernel of xfuser, which cannot be used here ({type(error).__name__}: {error});"
            " install ditmill[gpu] on a machine with a GPU, or use native"
        ) from error
    package = _PACKAGES.get(attention)
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"{ATTENTION}: {attention} wants the package {package}, which is not here; install it, or use native"
        )
    function: Any = ATTENTION_FUNCTION_REGISTRY[AttentionBackendType[attention.upper()]]

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = function(query, key, value, 0.0, False)
        return out, lse.float()

    return kernel
