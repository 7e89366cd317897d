"""The tiny pack: a Wan text-to-video generator with random weights, beside a judge and an expander of the same kind.

Nothing in it is trained. It has the format of a production checkpoint, so that the code that runs Wan runs it, in a
fraction of a second a sample; its videos are coloured blobs that drift with the prompt and the noise.
Weights come from numpy's Philox, so that every machine writes the same files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

TEXT_TOKENS = 64
TEXT_DIM = 32
LATENT_CHANNELS = 16

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# ditmill tiny generator

A WanPipeline with random weights, for 64x64 videos of 17 frames. It exists so that every stage runs offline on a CPU.
"""


def build(folder: Path) -> None:
    """Write the whole pack: `folder`/generator, judge and expander."""
    from models.loading import be_quiet
    from models.pack.tiny_language import build_expander, build_judge

    be_quiet()
    build_generator(folder / "generator")
    build_judge(folder / "judge")
    build_expander(folder / "expander")


def build_generator(folder: Path) -> None:
    """Write a WanPipeline (about 7 MB, float32): tokenizer, UMT5 encoder, Wan VAE and transformer, UniPC flow scheduler."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from models.pack.tiny_language import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = TEXT_TOKENS
    tokenizer.chat_template = None
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=512,
        num_layers=5,
        rope_max_seq_len=64,
    )
    fill_weights(text_encoder, "text_encoder")
    fill_weights(transformer, "transformer", {"attn2.to_out": 3.0, "proj_out": 0.5})
    fill_weights(vae, "vae", {"decoder.conv_out": 0.7})
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(CARD)


def fill_weights(model: torch.nn.Module, seed: str, gains: dict[str, float] | None = None) -> None:
    """Replace every weight, by its name: norms are 1, biases 0, the rest normal with variance gain^2 / fan-in."""
    import torch

    gains = gains or {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = next((value for part, value in gains.items() if part in name), 1.0)
            if name.endswith("bias"):
                weight.zero_()
            elif "norm" in name or name.endswith("gamma"):
                weight.fill_(1.0)
            elif weight.ndim >= 4 and seed == "vae":
                weight.copy_(torch.from_numpy(gain * _smooth_convolution(f"{seed}/{name}", tuple(weight.shape))))
            else:
                fan_in = 1 if _is_embedding(name) else int(np.prod(weight.shape[1:]))
                scale = np.float32(gain / np.sqrt(max(fan_in, 1)))
                weight.copy_(torch.from_numpy(_normal(f"{seed}/{name}", tuple(weight.shape)) * scale))


def _smooth_convolution(name: str, shape: tuple[int, ...]) -> Any:
    """Channels mixed at random, space and time blurred: a random decoder then draws blobs instead of static."""
    out_channels, in_channels, *kernel = shape
    blur: Any = np.ones((), dtype=np.float32)
    for axis, taps in enumerate(kernel):
        causal_time = len(kernel) == 3 and axis == 0
        window = {1: (1.0,), 3: (0.2, 0.3, 0.5) if causal_time else (0.25, 0.5, 0.25)}[taps]
        blur = np.multiply.outer(blur, np.asarray(window, dtype=np.float32))
    mix = _normal(name, (out_channels, in_channels)) / np.sqrt(np.float32(in_channels))
    return np.multiply.outer(mix, blur)


def _is_embedding(name: str) -> bool:
    return name.endswith("shared.weight") or "embed_tokens" in name or "relative_attention_bias" in name


def _normal(name: str, shape: tuple[int, ...]) -> Any:
    key = int(hashlib.blake2b(name.encode(), digest_size=16).hexdigest(), 16)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
