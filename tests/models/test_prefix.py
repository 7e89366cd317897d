from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from models.prefix import Prefix, Prefixes


def clips(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 4, 4, 3), dtype=np.uint8)


def prefix(count: int, length: int = 10) -> Prefix:
    cache = DynamicCache()
    for layer in range(2):
        values = torch.arange(count * length, dtype=torch.float32).reshape(count, 1, length, 1) + layer
        cache.update(values, -values, layer)
    return Prefix(cache, length, count, None)


def test_rows_are_copies_to_go_on_from():
    read = prefix(3)
    forked = read.rows([2, 2, 0])
    assert forked.layers[1].keys[:, 0, 0, 0].tolist() == [21, 21, 1]
    forked.update(torch.zeros(3, 1, 4, 1), torch.zeros(3, 1, 4, 1), 0)
    assert (forked.get_seq_length(), read.cache.get_seq_length(), len(read.cache.layers[0].keys)) == (14, 10, 3)


def test_a_clip_is_found_where_it_was_read_last():
    kept, frames = Prefixes(100), clips(3)
    first = kept.keep(prefix(3), frames)
    assert [kept.find(clip) for clip in frames] == first
    assert kept.find(frames[0, :1]) is None
    assert kept.find(frames[0].reshape(4, 2, 4, 3)) is None
    (again,) = kept.keep(prefix(1), frames[1:2])
    assert kept.find(frames[1].copy()) == again != first[1]


def test_the_oldest_goes_where_room_is_short_and_what_was_read_again_stays():
    kept, frames = Prefixes(50), clips(5)
    kept.keep(prefix(2), frames[:2])
    kept.keep(prefix(2), frames[1:3])
    kept.keep(prefix(2), frames[3:])
    assert [kept.find(clip) is not None for clip in frames] == [False, True, True, True, True]
    kept.keep(prefix(4, 100), frames[:4])
    assert [kept.find(clip) is not None for clip in frames] == [True, True, True, True, False]
