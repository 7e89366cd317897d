from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import near
from pipelines.near import CHROMA_LEVELS, KEPT, CosineIndex, HashIndex, cells, thin


def greedily(count: int, is_near: np.ndarray, first: int) -> list[int]:
    """By the definition: the first kept one that is near, of all pairs."""
    by = [KEPT] * count
    for at in range(first, count):
        by[at] = next((other for other in range(at) if by[other] == KEPT and is_near[at, other]), KEPT)
    return by


def flipped(rng: np.random.Generator, count: int, groups: int, most: int) -> np.ndarray:
    """Codes uint64 [count, 3] around a few, each with up to `most` bits changed."""
    codes = rng.integers(0, 2**63, (groups, 3), dtype=np.uint64)[rng.integers(0, groups, count)]
    for code in codes:
        for bit in rng.choice(192, rng.integers(0, most + 1), replace=False).tolist():
            code[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return codes


def hash_pairs(codes: np.ndarray, chroma: np.ndarray, known: np.ndarray, bits: float) -> np.ndarray:
    differing = np.bitwise_count(codes[:, None] ^ codes[None]).sum(axis=2, dtype=int)
    levels = np.abs(chroma[:, None].astype(int) - chroma[None]).max(axis=2)
    return (differing <= bits * 3) & (levels <= CHROMA_LEVELS) & known[:, None] & known[None]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 150),
    bits=st.sampled_from([0, 1, 1.5, 3, 4, 6, 8, 12]),
    first=st.integers(0, 40),
    block=st.sampled_from([1, 16, 4096]),
)
def test_thin_by_hash_is_what_all_pairs_give(seed, count, bits, first, block):
    rng = np.random.default_rng(seed)
    codes = flipped(rng, count, groups=max(1, count // 6), most=40)
    chroma = rng.integers(100, 118, (count, 6)).astype(np.uint8)
    known = rng.random(count) > 0.1
    before, near.BLOCK = near.BLOCK, block
    try:
        found = thin(count, [HashIndex(codes, chroma, known, bits)], first=min(first, count))
    finally:
        near.BLOCK = before
    assert found.tolist() == greedily(count, hash_pairs(codes, chroma, known, bits), min(first, count))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    cosine=st.sampled_from([0.3, 0.9, 0.99, 1.0]),
    centres=st.integers(1, 12),
    block=st.sampled_from([16, 4096]),
)
def test_thin_by_cosine_is_what_all_pairs_give(seed, cosine, centres, block):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((15, 12))[rng.integers(0, 15, 120)] + 0.15 * rng.standard_normal((120, 12))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    known = rng.random(120) > 0.1
    alike = vectors.astype(np.float32) @ vectors.astype(np.float32).T >= cosine
    before, near.BLOCK = near.BLOCK, block
    try:
        found = thin(120, [CosineIndex(vectors, known, cosine, cells(vectors, centres))], first=10)
    finally:
        near.BLOCK = before
    assert found.tolist() == greedily(120, alike & known[:, None] & known[None], 10)


@pytest.mark.parametrize("match", ["either", "both"])
def test_thin_by_both_is_what_all_pairs_give(match):
    rng = np.random.default_rng(0)
    codes = flipped(rng, 200, groups=20, most=30)
    vectors = rng.standard_normal((10, 8))[rng.integers(0, 10, 200)] + 0.1 * rng.standard_normal((200, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    known, chroma = np.ones(200, bool), np.zeros((200, 4), np.uint8)
    by_hash = hash_pairs(codes, chroma, known, 6)
    by_cosine = vectors.astype(np.float32) @ vectors.astype(np.float32).T >= 0.97
    found = thin(200, [HashIndex(codes, chroma, known, 6), CosineIndex(vectors, known, 0.97, cells(vectors, 5))], match)
    expected = greedily(200, by_hash | by_cosine if match == "either" else by_hash & by_cosine, 0)
    assert found.tolist() == expected
    assert 0 < sum(by != KEPT for by in expected) < 199


def test_thin_makes_no_chains():
    """0, 6 and 12 bits: the middle one is near both ends, which are not near each other."""
    codes = np.array([[0, 0, 0], [2**6 - 1] * 3, [2**12 - 1] * 3], np.uint64)
    index = HashIndex(codes, np.zeros((3, 1), np.uint8), np.ones(3, bool), 6)
    assert thin(3, [index]).tolist() == [KEPT, 0, KEPT]


def test_many_equal_ones_need_little_memory():
    import tracemalloc

    count = 12_000
    codes, chroma = np.zeros((count, 3), np.uint64), np.zeros((count, 96), np.uint8)
    tracemalloc.start()
    found = thin(count, [HashIndex(codes, chroma, np.ones(count, bool), 6)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[0] == KEPT and (found[1:] == 0).all()
    assert peak < 1e8  # all pairs are 72 million
