"""What a denoiser is conditioned on: texts become the tensors that a family's pipeline takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from models.families import Family
from models.plan import SamplerPlan

if TYPE_CHECKING:
    import torch


def text_length(family: Family, pipe: Any, plan: SamplerPlan) -> int | None:
    """Tokens that every text is padded or cut to; None where the encoder has one fixed length."""
    if family.max_sequence_length is None:
        return None
    limits = (
        [family.max_sequence_length] if family.fixed_length else [family.max_sequence_length, plan.max_sequence_length]
    )
    tokenizer = getattr(pipe, family.tokenizer, None) if family.tokenizer else None
    if tokenizer is not None:
        limits.append(tokenizer.model_max_length)  # about 1e30 where there is no limit
    return int(min(limits))


def encode_texts(
    family: Family, pipe: Any, prompts: list[str], negative_prompts: list[str], plan: SamplerPlan
) -> dict[str, np.ndarray]:
    """Embeddings, masks and pooled vectors by the name of the pipeline's argument, each [n, ...]; floats are float32.

    Every text is padded to one length, so that a sample's tensors do not depend on its neighbours.
    """
    import torch

    with torch.inference_mode():
        if family.pads_text:
            return _numpy(_encode(family, pipe, prompts, negative_prompts, plan))
        length = text_length(family, pipe, plan)
        assert length is not None
        rows = [
            _padded(_encode(family, pipe, [prompt], [negative], plan), length)
            for prompt, negative in zip(prompts, negative_prompts, strict=True)
        ]
        return _numpy({name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def _encode(
    family: Family, pipe: Any, prompts: list[str], negative_prompts: list[str], plan: SamplerPlan
) -> dict[str, torch.Tensor]:
    known = inspect.signature(pipe.encode_prompt).parameters
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
        if name in ("complex_human_instruction", "prompt_template")
    }
    arguments: dict[str, Any] = {
        "prompt_2": None,
        "prompt_3": None,
        "max_sequence_length": text_length(family, pipe, plan),
        "device": pipe._execution_device,
        **defaults,
    }
    guided = family.uses_negative(plan.guidance_scale)
    if "negative_prompt" in known:
        arguments |= {"negative_prompt": list(negative_prompts), "do_classifier_free_guidance": guided}
    arguments = {name: value for name, value in arguments.items() if name in known}

    def call(texts: list[str], prefix: str = "") -> dict[str, torch.Tensor]:
        values = pipe.encode_prompt(prompt=list(texts), **arguments)
        pairs = zip(family.embeds, values, strict=True)
        return {prefix + name: value for name, value in pairs if name is not None and value is not None}

    tensors = call(prompts)
    if guided and "negative_prompt" not in known:
        tensors |= call(negative_prompts, "negative_")
    if not guided:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("negative_")}
    if guided and pipe.config.get("force_zeros_for_empty_prompt"):
        _zero_empty(tensors, negative_prompts)
    return tensors


def _zero_empty(tensors: dict[str, torch.Tensor], negative_prompts: list[str]) -> None:
    """Stable Diffusion XL was trained with zeros, not with an empty text, where there is no negative prompt."""
    for row, text in enumerate(negative_prompts):
        if not text:
            for name in tensors:
                if name.startswith("negative_"):
                    tensors[name][row] = 0


def _padded(tensors: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """One text's embeddings and mask at `length` tokens. A missing mask means that all tokens count."""
    import torch

    result = {}
    for name in [name for name in tensors if name.endswith("embeds")]:
        embeds = tensors[name][:, :length]
        mask = tensors.get(f"{name}_mask")
        mask = (
            embeds.new_ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask[:, :length].to(torch.int64)
        )
        missing = length - embeds.shape[1]
        result[name] = torch.nn.functional.pad(embeds, (0, 0, 0, missing))
        result[f"{name}_mask"] = torch.nn.functional.pad(mask, (0, missing))
    return result


def _numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        for name, tensor in tensors.items()
    }
