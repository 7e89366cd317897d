"""Attention over a sequence that is split over ranks: Ulysses, ring, and both at once (USP).

Ulysses (Jacobs et al. 2023, arXiv 2309.14509) exchanges tokens for heads, so that each rank attends over all tokens with some
of the heads. Ring attention (Liu et al. 2023, arXiv 2310.01889) keeps the heads and passes keys and values round, one
neighbour to the next, while it attends to those it has; partial results are merged by their log-sum-exp. USP (Fang and Zhao
2024, arXiv 2405.07719) is Ulysses inside each node of a ring.

Tokens stand in order over the ranks: rank (r, u) of a ring of R and Ulysses of U holds part r * U + u of R * U equal ones.
The last ones may be padding; it is cut off before anything attends to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""As `attend`."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its logits: [b, h, n, d] and float32 [b, h, n] of [b, h, n or m, d].

    On a CPU in float32 or half precision; on a GPU half precision goes through FlashAttention, float32 through the
    memory-efficient kernel.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        return out, lse.float()
    if query.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
        return out, lse[..., : query.shape[2]].float()
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out, lse.float()


@dataclass(frozen=True)
class Split:
    """How a sequence lies over ranks, and what attends to it there. A group of None is one of a single rank."""

    ring: ProcessGroup | None = None
    ulysses: ProcessGroup | None = None
    attend: Kernel = attend

    @property
    def ring_size(self) -> int:
        return size_of(self.ring)

    @property
    def ulysses_size(self) -> int:
        return size_of(self.ulysses)

    @property
    def parts(self) -> int:
        return self.ring_size * self.ulysses_size

    @property
    def part(self) -> int:
        """Which of the parts this rank holds."""
        return rank_in(self.ring) * self.ulysses_size + rank_in(self.ulysses)

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of `whole`, whose length along `dim` is padded with zeros to one that divides."""
        length = -(-whole.shape[dim] // self.parts)
        missing = length * self.parts - whole.shape[dim]
        if missing:
            shape = list(whole.shape)
            shape[dim] = missing
            whole = torch.cat([whole, whole.new_zeros(shape)], dim=dim)
        return whole.narrow(dim, self.part * length, length).contiguous()

    def join(self, part: Tensor, dim: int, length: int) -> Tensor:
        """All parts in order, cut to `length` along `dim`; the same on every rank."""
        for group in (self.ulysses, self.ring):
            if size_of(group) > 1:
                pieces = [torch.empty_like(part) for _ in range(size_of(group))]
                dist.all_gather(pieces, part.contiguous(), group=group)
                part = torch.cat(pieces, dim=dim)
        return part.narrow(dim, 0, length)


def size_of(group: ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from that over each: float32."""
    total = torch.logaddexp(lse, more_lse)
    weight, more_weight = (torch.exp(part - total)[..., None] for part in (lse, more_lse))
    return out.float() * weight + more.float() * more_weight, total


def split_attention(query: Tensor, key: Tensor, value: Tensor, split: Split, length: int) -> Tensor:
    """Attention of this rank's tokens to all `length` tokens: [b, n, h, d] of [b, n, h, d], n tokens a rank."""
    heads = query.shape[2]
    query, key, value = (tokens_for_heads(part, split.ulysses) for part in (query, key, value))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    out = _ring(query, key, value, split, length)
    return heads_for_tokens(out.transpose(1, 2), split.ulysses, heads)


def _ring(query: Tensor, key: Tensor, value: Tensor, split: Split, length: int) -> Tensor:
    """Attention to the keys of each rank of the ring in turn. Those of the next one are on their way meanwhile."""
    if split.ring is None or split.ring_size == 1:
        return split.attend(query, key[:, :, :length].contiguous(), value[:, :, :length].contiguous())[0]
    ring, count, at = split.ring, split.ring_size, dist.get_rank(split.ring)
    onward, before = (dist.get_global_rank(ring, (at + step) % count) for step in (1, -1))
    held = torch.stack([key, value])
    result: tuple[Tensor, Tensor] | None = None
    for turn in range(count):
        moving = []
        if turn + 1 < count:
            arriving = torch.empty_like(held)
            moving = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, held, onward, group=ring),
                    dist.P2POp(dist.irecv, arriving, before, group=ring),
                ]
            )
        owner = (at - turn) % count
        known = min(max(length - owner * held.shape[3], 0), held.shape[3])
        if known:
            part = split.attend(query, held[0, :, :, :known].contiguous(), held[1, :, :, :known].contiguous())
            result = part if result is None else merge(*result, *part)
        for each in moving:
            each.wait()
        if moving:
            held = arriving
    assert result is not None
    return result[0].to(query.dtype)


def tokens_for_heads(part: Tensor, group: ProcessGroup | None) -> Tensor:
    """Of some tokens with all heads, all tokens with some heads: [b, n, h, d] to [b, n * U, ceil(h / U), d].

    Heads that are missing for an equal share are zeros.
    """
    count = size_of(group)
    if count == 1:
        return part
    batch, tokens, heads, width = part.shape
    share = -(-heads // count)
    if share * count > heads:
        part = torch.cat([part, part.new_zeros(batch, tokens, share * count - heads, width)], dim=2)
    sent = part.reshape(batch, tokens, count, share, width).permute(2, 0, 1, 3, 4).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got.transpose(0, 1).reshape(batch, count * tokens, share, width)


def heads_for_tokens(part: Tensor, group: ProcessGroup | None, heads: int) -> Tensor:
    """The way back: [b, n * U, ceil(h / U), d] to [b, n, h, d]."""
    count = size_of(group)
    if count == 1:
        return part
    batch, tokens, share, width = part.shape
    sent = part.reshape(batch, count, tokens // count, share, width).transpose(0, 1).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got.permute(1, 2, 0, 3, 4).reshape(batch, tokens // count, count * share, width)[:, :, :heads]
