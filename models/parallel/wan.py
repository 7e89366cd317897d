"""Wan's denoiser over ranks: where its sequence is cut and joined, self-attention in between, and layers in stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.parallel.attention import Split, heads_for_tokens, split_attention, tokens_for_heads


def split_sequence(transformer: Any, split: Split) -> None:
    """Have each rank compute its own part of the tokens. Inputs and output stay whole, the same on every rank.

    Cut are the rotary embedding and, before the first block, the tokens (and each token's timestep, where Wan 2.2 gives
    one); joined is what the last projection makes. Text is whole everywhere, so that cross-attention is as it was.
    """
    length = 0

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal length
        length = tokens_of(transformer, args[0] if args else kwargs["hidden_states"])
        if len(args) > 1:
            args = (args[0], _cut_timestep(args[1], split), *args[2:])
        elif "timestep" in kwargs:
            kwargs = {**kwargs, "timestep": _cut_timestep(kwargs["timestep"], split)}
        return args, kwargs

    def cut(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (split.take(args[0], 1), *args[1:])

    def cut_rotary(module: Any, args: Any, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(split.take(part, 1) for part in rotary)

    def join(module: Any, args: Any, out: Tensor) -> Tensor:
        return split.join(out, 1, length)

    transformer.register_forward_pre_hook(remember, with_kwargs=True)
    transformer.blocks[0].register_forward_pre_hook(cut)
    transformer.rope.register_forward_hook(cut_rotary)
    transformer.proj_out.register_forward_hook(join)
    for block in transformer.blocks:
        block.attn1.set_processor(SplitAttention(split, lambda: length))


class SelfAttention(ABC):
    """Wan's self-attention but for what attends to what; a drop-in for diffusers' WanAttnProcessor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        parts = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in parts)
        out = self.attended(query, key, value, rotary_emb)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(hidden_states)))

    @abstractmethod
    def attended(self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[b, n, h, d] of queries and keys without their rotary embedding, and values, each [b, n, h, d]."""


class SplitAttention(SelfAttention):
    """Over tokens that lie on several ranks."""

    def __init__(self, split: Split, length: Callable[[], int]) -> None:
        self.split, self.length = split, length

    def attended(self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        query, key = (rotate(part, *rotary) for part in (query, key))
        return split_attention(query, key, value, self.split, self.length())


@dataclass
class Window:
    """What the self-attention of a stage shares while one window of frames goes through it.

    `future` holds, by layer, keys and values of the first context frames of the next block, [b, tokens, h, d], as that block
    left them one task before; `fresh` is what this one leaves. Keys are kept without their rotary embedding, because in the
    other block's window they stand elsewhere. The norm before it looks at each token alone, so that it makes no difference
    whether they are kept before or after it; after it, heads can be on other ranks.
    """

    tokens: int = 0
    """Of the window."""
    kept: tuple[int, int] = (0, 0)
    """Those that the next task may want, from and to."""
    future: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    split: Split = field(default_factory=Split)


class WindowAttention(SelfAttention):
    """Of one layer, over a window and the cached start of the next block."""

    def __init__(self, layer: int, window: Window) -> None:
        self.layer, self.window = layer, window

    def attended(self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        window, group, heads = self.window, self.window.split.ulysses, query.shape[2]
        query, key, value = (tokens_for_heads(part, group) for part in (query, key, value))
        padding = query.shape[1] - window.tokens
        query, key, value = (part[:, : window.tokens] for part in (query, key, value))
        window.fresh[self.layer] = (key[:, slice(*window.kept)].clone(), value[:, slice(*window.kept)].clone())
        if self.layer in window.future:
            more_keys, more_values = window.future[self.layer]
            key, value = torch.cat([key, more_keys], dim=1), torch.cat([value, more_values], dim=1)
        query, key = (rotate(part, *(angle[:, : part.shape[1]] for angle in rotary)) for part in (query, key))
        out = window.split.attend(*(part.transpose(1, 2).contiguous() for part in (query, key, value)))[0].transpose(
            1, 2
        )
        if padding:
            out = torch.cat([out, out.new_zeros(len(out), padding, *out.shape[2:])], dim=1)
        return heads_for_tokens(out, group, heads)


class Stage:
    """Some layers of a denoiser, fed with windows of frames."""

    def __init__(self, transformer: Any, layers: range, split: Split) -> None:
        self.transformer, self.layers = transformer, layers
        self.window = Window(split=split)
        self._before = [transformer.blocks[layer].attn1.processor for layer in layers]
        for layer in layers:
            transformer.blocks[layer].attn1.set_processor(WindowAttention(layer, self.window))

    def close(self) -> None:
        for layer, processor in zip(self.layers, self._before, strict=True):
            self.transformer.blocks[layer].attn1.set_processor(processor)

    def hidden_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of what travels between stages for latents [b, c, t, h, w]."""
        tokens = -(-tokens_of(self.transformer, torch.empty(shape, device="meta")) // self.window.split.parts)
        return shape[0], tokens, self.transformer.patch_embedding.out_channels

    def __call__(self, given: Tensor, shape: tuple[int, ...], longest: int, timestep: Tensor, text: Tensor) -> Tensor:
        """Hidden states after this stage's layers; the first stage is given latents, the last one gives the velocity.

        Args:
            given: latents of the window [b, c, t, h, w], or hidden states of `hidden_shape`.
            shape: that of the latents.
            longest: frames of the longest window and its future together, for which positions are made.
            timestep: [b]. text: [b, tokens, width].
        """
        model, split = self.transformer, self.window.split
        batch, _, frames, height, width = shape
        rotary = model.rope(torch.empty(1, 1, longest, height, width, device=given.device))
        embedded, projected, text, _ = model.condition_embedder(timestep, text, None)
        hidden = given
        if self.layers.start == 0:
            hidden = split.take(model.patch_embedding(given).flatten(2).transpose(1, 2).contiguous(), 1)
        for layer in self.layers:
            hidden = model.blocks[layer](hidden, text, projected.unflatten(1, (6, -1)), rotary)
        if self.layers.stop < len(model.blocks):
            return hidden
        shift, scale = (model.scale_shift_table + embedded.unsqueeze(1)).chunk(2, dim=1)
        hidden = model.proj_out((model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
        hidden = split.join(hidden, 1, self.window.tokens)
        size, across = model.config.patch_size, model.config.patch_size[2]
        grid = hidden.reshape(batch, frames // size[0], height // size[1], width // across, *size, -1)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def rotate(part: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of [b, n, h, d] by [1, n, 1, d], each value of which stands twice."""
    even, odd = part.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cosines[..., 0::2], sines[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(part)


def tokens_of(transformer: Any, latents: Tensor) -> int:
    sizes = zip(latents.shape[2:], transformer.config.patch_size, strict=True)
    frames, height, width = (size // patch for size, patch in sizes)
    return frames * height * width


def _cut_timestep(timestep: Tensor, split: Split) -> Tensor:
    return split.take(timestep, 1) if timestep.ndim == 2 else timestep
