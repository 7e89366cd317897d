"""Layouts over ranks give what one process gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.parallel.attention import Split, attend, merge, split_attention
from models.parallel.degrees import Degrees, build_mesh
from models.parallel.wan import split_sequence
from tests.models.parallel.ranks import on_ranks

LAYOUTS = {
    "ulysses 2": Degrees(ulysses=2),
    "ring 2": Degrees(ring=2),
    "ulysses 4": Degrees(ulysses=4),
    "ring 4": Degrees(ring=4),
    "2 x 2": Degrees(ulysses=2, ring=2),
}


def tiny_wan(heads: int = 4, layers: int = 3) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()


def inputs(frames: int, height: int = 4, width: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, frames, height, width),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
    }


def split_of(degrees: Degrees) -> Split:
    mesh = build_mesh(degrees)
    return Split(ring=mesh["ring"].get_group(), ulysses=mesh["ulysses"].get_group())


def _denoise(degrees: Degrees, frames: int, heads: int) -> list[torch.Tensor]:
    transformer = tiny_wan(heads)
    split_sequence(transformer, split_of(degrees))
    with torch.no_grad():
        return [transformer(**inputs(count), return_dict=False)[0] for count in (frames, 2, frames)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_sequence_gives_what_one_process_gives(layout: str):
    degrees = LAYOUTS[layout]
    transformer = tiny_wan()
    with torch.no_grad():
        whole = [transformer(**inputs(count), return_dict=False)[0] for count in (5, 2)]
    for first, second, again in on_ranks(degrees.size, _denoise, degrees, 5, 4):
        assert torch.equal(first, again)
        for made, wanted in zip((first, second), whole, strict=True):
            assert (made - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_tokens_and_heads_that_do_not_divide_are_padded():
    degrees = Degrees(ulysses=4)
    transformer = tiny_wan(heads=3)
    with torch.no_grad():
        whole = transformer(**inputs(5, width=6), return_dict=False)[0]
    for made, *_ in on_ranks(4, _denoise, degrees, 5, 3):
        assert (made - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_partial_attention_is_merged_by_its_log_sum_exp():
    torch.manual_seed(2)
    query, key, value = torch.randn(3, 2, 3, 9, 8).unbind(0)
    whole, lse = attend(query, key, value)
    parts = [
        attend(query, key[:, :, at].contiguous(), value[:, :, at].contiguous()) for at in (slice(0, 4), slice(4, 9))
    ]
    out, total = merge(*parts[0], *parts[1])
    assert torch.allclose(out, whole, atol=1e-6) and torch.allclose(total, lse, atol=1e-6)
    logits = query @ key.transpose(-1, -2) / 8**0.5
    assert torch.allclose(lse, logits.logsumexp(-1), atol=1e-5)


def _ring_memory(degrees: Degrees, tokens: int) -> int:
    """Bytes of the largest tensor that moves between ranks."""
    import torch.distributed as dist

    split, seen = split_of(degrees), []
    sent = dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda ops: (seen.extend(op.tensor.nbytes for op in ops), sent(ops))[1]
    torch.manual_seed(3)
    part = torch.randn(1, tokens // degrees.ring, 2, 8)
    split_attention(part, part, part, split, tokens)
    return max(seen)


def test_a_ring_holds_less_of_the_keys_the_more_ranks_it_has():
    two = max(on_ranks(2, _ring_memory, Degrees(ring=2), 64))
    four = max(on_ranks(4, _ring_memory, Degrees(ring=4), 64))
    assert four == two / 2
