"""Randomly initialised Wan denoisers of a stated size: true speed and memory, no pictures."""

from __future__ import annotations

from typing import Any

import torch

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {
        "num_attention_heads": 8,
        "attention_head_dim": 32,
        "ffn_dim": 1024,
        "num_layers": 8,
        "text_dim": 256,
        "rope_max_seq_len": 1024,
    },
    # Wan 2.1 T2V 1.3B, from its transformer/config.json
    "wan-1.3b": {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "num_layers": 30,
        "text_dim": 4096,
        "rope_max_seq_len": 1024,
    },
}
CHANNELS = 16
TEXT_TOKENS = 32


def build_denoiser(
    size: str, *, layers: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The same weights in every process."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    config = CONFIGS[size] | {"in_channels": CHANNELS, "out_channels": CHANNELS}
    with torch.device(device):
        model = WanTransformer3DModel(**config | ({"num_layers": layers} if layers else {}))
    return (model if dtype == torch.float32 else model.to(dtype)).eval()


def build_inputs(
    size: str, frames: int, side: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Latents [1, 16, frames, side, side] and the embeddings of two branches, [1, 32, width] each."""
    torch.manual_seed(1)
    width = CONFIGS[size]["text_dim"]
    made = {
        "latents": torch.randn(1, CHANNELS, frames, side, side),
        "conditional": torch.randn(1, TEXT_TOKENS, width),
        "unconditional": torch.randn(1, TEXT_TOKENS, width),
    }
    return {name: value.to(device, dtype) for name, value in made.items()}
