"""Batches as the planner makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

PROMPTS = (
    "a red circle bouncing",
    "a blue square",
    "the sea at night, seen from a hill above a small town with a harbour and many lights",
    "fire",
    "snow on a mountain",
    "a green star",
    "a dog running",
    "two birds",
)


@pytest.fixture
def planned() -> Callable[..., dict[str, np.ndarray]]:
    """A planned batch of 64x64x17 videos: `planned(3)`, or with columns of one's own: `planned(3, prompt=[...])`."""
    from models.noise import noise_key
    from stages.batch import texts

    def make(count: int, **columns: Any) -> dict[str, np.ndarray]:
        prompts = list(columns.pop("prompt", PROMPTS[:count]))
        batch = {
            "sample_id": texts([f"sample{at}" for at in range(count)]),
            "prompt": texts(prompts),
            "negative_prompt": texts([""] * count),
            "noise_key": texts([noise_key(0, prompt, 0) for prompt in PROMPTS[:count]]),
            "inputs": texts(["[]"] * count),
            "extra": texts([""] * count),
            "error_type": texts([""] * count),
            "error": texts([""] * count),
            "error_stage": texts([""] * count),
            "fps": np.full(count, 8.0),
        }
        shape = {"generator": 0, "height": 64, "width": 64, "num_frames": 17}
        batch |= {name: np.full(count, value, dtype=np.int64) for name, value in shape.items()}
        for name, value in columns.items():
            batch[name] = texts(value) if isinstance(value[0], str) else np.asarray(value)
        return batch

    return make


@pytest.fixture(scope="session")
def tiny_whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline of no family (Stable Diffusion 1)."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from models.pack.tiny import fill_weights
    from models.pack.tiny_language import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.padding_side, tokenizer.model_max_length = "right", 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=4,
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=2,
    )
    for name, model in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        fill_weights(model, name)
    folder = tmp_path_factory.mktemp("whole")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)
