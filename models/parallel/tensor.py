"""Tensor parallel: heads and feed-forward channels of a Wan denoiser over ranks, by torch.distributed.tensor.

Query, key, value and the first feed-forward matrix are cut by columns, the output matrices by rows (Shoeybi et al. 2019,
arXiv 1909.08053). Wan normalises queries and keys over all heads at once, so that norm needs the ranks' sum of squares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


class DistributedRMSNorm(nn.Module):
    """Root mean square norm over channels that lie on several ranks; `norm` is the whole one, of which a part is kept."""

    def __init__(self, norm: Any, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group, self.eps = mesh.get_group(), norm.eps or torch.finfo(torch.float32).eps
        self.channels = norm.weight.shape[0]
        part = norm.weight.chunk(mesh.size())[mesh.get_local_rank()]
        self.weight = nn.Parameter(part.detach().clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        squares = hidden.float().square().sum(dim=-1, keepdim=True)
        dist.all_reduce(squares, group=self.group)
        return (hidden.float() * torch.rsqrt(squares / self.channels + self.eps)).type_as(hidden) * self.weight


def split_tensors(transformer: Any, mesh: DeviceMesh) -> None:
    """Keep this rank's part of every block's weights. Inputs and outputs of a block stay whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in transformer.blocks:
        plan: dict[str, Any] = {"ffn.net.0.proj": ColwiseParallel(), "ffn.net.2": RowwiseParallel()}
        for name in ("attn1", "attn2"):
            attention = getattr(block, name)
            attention.heads //= mesh.size()
            inner = ["to_q", "to_k", "to_v"]
            inner += [more for more in ("add_k_proj", "add_v_proj") if getattr(attention, more, None) is not None]
            plan |= {f"{name}.{part}": ColwiseParallel() for part in inner} | {f"{name}.to_out.0": RowwiseParallel()}
            for norm in ("norm_q", "norm_k", "norm_added_k"):
                if getattr(attention, norm, None) is not None:
                    setattr(attention, norm, DistributedRMSNorm(getattr(attention, norm), mesh))
        parallelize_module(block, mesh, plan)


def is_split(transformer: Any) -> bool:
    return any(isinstance(module, DistributedRMSNorm) for module in transformer.modules())


def load_split(folder: Path, mesh: DeviceMesh, dtype: torch.dtype) -> Any:
    """Wan's denoiser from `folder`, of which this rank reads and holds its own part alone.

    In `dtype`, but for what `from_pretrained` keeps in float32 too.
    """
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    split_tensors(transformer, mesh)
    count, rank = mesh.size(), mesh.get_local_rank()
    exact = set(transformer._keep_in_fp32_modules or ())
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    for path, module in transformer.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            whole = where[full].get_slice(full)
            kept = torch.float32 if exact.intersection(full.split(".")) else dtype
            if isinstance(weight, DTensor):
                shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
                cut = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
                part = DTensor.from_local(
                    whole[cut].to(kept), mesh, weight.placements, shape=weight.shape, stride=weight.stride()
                )
            elif isinstance(module, DistributedRMSNorm):
                share = module.channels // count
                part = whole[rank * share : (rank + 1) * share].to(kept)
            else:
                part = whole[:].to(kept)
            setattr(module, name, nn.Parameter(part, requires_grad=False))
    return transformer.eval()
