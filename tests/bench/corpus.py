"""How well near-duplicates are found, and how long it takes among a million hashes.

    ditmill bench corpus [--clips 400] [--seed 0] [--samples 1000000] [--json]

Clips of the shapes world, each of a scene of its own, and of every clip one copy: re-encoded (x264, crf 30), shifted by a
pixel, 12 levels brighter, or all three. What is found are copies among the pairs of a clip and its copy (recall), and such
pairs among all pairs that are called near (precision). Their baseline is the check of ScoreMedia (one hash of the middle
frame, equal in all bits, and small copies that differ by at most 16 levels), over the same pairs.

The search is timed on random hashes with planted neighbours; its baseline compares all pairs of the first 20,000 and is
scaled by the square. CPU-seconds of one thread, and the process's own memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable

import numpy as np

from infra.media import decode, encode
from models.pack.grammar import sample_scenes
from models.pack.train.loop import stream
from models.pack.world import render
from pipelines.embedding import embedding_kind
from pipelines.near import KEPT, HashIndex, thin
from pipelines.rules import EmbeddingRule
from pipelines.signatures import HashKind, Kind, embeddings, hashes
from stages.score import THUMB_LEVELS, perceptual_hash, thumbnails
from tests.bench.support.figures import Figure, share, table

FPS = 8.0
BITS, COSINE = 6.0, 0.995
COMPARED = 20_000


def shifted(frames: np.ndarray) -> np.ndarray:
    return np.concatenate([frames[:, :, :1], frames[:, :, :-1]], axis=2)


def brighter(frames: np.ndarray) -> np.ndarray:
    return np.clip(frames.astype(int) + 12, 0, 255).astype(np.uint8)


def stored(frames: np.ndarray, crf: int = 18) -> np.ndarray:
    return decode(encode(frames, FPS, crf=crf).data, "mp4")


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "re-encoded": lambda frames: stored(frames, crf=30),
    "shifted": lambda frames: stored(shifted(frames)),
    "brighter": lambda frames: stored(brighter(frames)),
    "all three": lambda frames: stored(brighter(shifted(frames)), crf=30),
}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    options = _arguments()
    figures = _quality(options.clips, options.seed) if options.clips else []
    speed = _speed(options.samples, options.seed) if options.samples else {}
    if options.json:
        print(json.dumps({"figures": [each.as_dict() for each in figures], "search": speed}))
        return
    if figures:
        print(
            f"{options.clips} clips of the shapes world and a copy of each; hash {BITS:g} of 64 bits, cosine {COSINE:g}"
        )
        print(table(figures))
    if speed:
        print(f"{options.samples:,} hashes: {speed['seconds']:.0f} CPU-seconds and {speed['gigabytes']:.2f} GB for all")
        print(
            f"all pairs of the first {speed['compared']:,}: {speed['all_pairs']:.1f} CPU-seconds, ours"
            f" {speed['same']:.2f}: {speed['all_pairs'] / speed['same']:.0f} times less; the same kept: {speed['equal']}"
        )
        print(f"scaled to {options.samples:,}: {speed['scaled'] / speed['seconds']:.0f} times less")


def _quality(count: int, seed: int) -> list[Figure]:
    rng = stream(seed, 6_800_000)
    clips = [stored(clip) for clip in render(_scenes(rng, count), range(count))]
    kinds = list(CHANGES)
    copies = [CHANGES[kinds[at % len(kinds)]](clip) for at, clip in enumerate(clips)]
    both = clips + copies
    codes, chroma = hashes(_signatures(HashKind(), both))
    kind = embedding_kind(EmbeddingRule(model="pack://shapes"))
    vectors = embeddings(_signatures(kind, both)).astype(np.float32)
    levels = np.array([np.abs(chroma.astype(np.int16) - row).max(axis=1) for row in chroma.astype(np.int16)])
    bits = np.array([np.bitwise_count(codes ^ row).sum(axis=1, dtype=int) for row in codes])
    index = HashIndex(codes, chroma, np.ones(len(both), bool), BITS)
    by_hash = np.stack([index.near(np.full(len(both), at), np.arange(len(both))) for at in range(len(both))])
    by_cosine = vectors @ vectors.T >= COSINE
    figures = []
    ways = {
        "ScoreMedia": _by_score_media(both),
        "hash": by_hash,
        "luma only": bits <= 3 * BITS,
        "embedding": by_cosine,
        "either": by_hash | by_cosine,
        "both": by_hash & by_cosine,
    }
    assert (by_hash == ((bits <= 3 * BITS) & (levels <= 12))).all()
    for name, near in ways.items():
        found = near[np.arange(count), count + np.arange(count)]
        pairs = int(np.triu(near, 1).sum())
        figures.append(share(name, "pairs called near that are a clip and its copy", int(found.sum()), pairs))
        figures.append(share(name, "copies that are found", int(found.sum()), count))
        if name in ("hash", "embedding", "either"):
            for at, change in enumerate(kinds):
                mine = found[at :: len(kinds)]
                figures.append(share(name, f"of those {change}", int(mine.sum()), len(mine)))
    return figures


def _scenes(rng: np.random.Generator, count: int) -> list:
    """Scenes that all differ: two clips of one are no copies, and not sure to be none either."""
    found: dict = {}
    while len(found) < count:
        found |= dict.fromkeys(sample_scenes(rng, count))
    return list(found)[:count]


def _signatures(kind: Kind, clips: list[np.ndarray]) -> np.ndarray:
    found: list[bytes] = []
    for start in range(0, len(clips), 16):
        found += kind.compute([clip[kind.positions(len(clip))] for clip in clips[start : start + 16]])
    return np.stack([np.frombuffer(value, np.uint8) for value in found])


def _by_score_media(clips: list[np.ndarray]) -> np.ndarray:
    digests = np.array([perceptual_hash(clip) for clip in clips], np.uint64)
    thumbs = np.stack([thumbnails(clip) for clip in clips]).reshape(len(clips), -1)
    alike = np.stack([np.abs(thumbs - row).max(axis=1) <= THUMB_LEVELS for row in thumbs])
    return (digests[:, None] == digests[None]) & alike


def _speed(count: int, seed: int) -> dict[str, float]:
    """Every tenth of random hashes has a neighbour that differs in 6 bits of each frame."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**64, (count, 3), dtype=np.uint64)
    codes[1::10] = codes[::10][: len(codes[1::10])] ^ np.uint64(0b111111 << 20)
    chroma, known = np.zeros((count, 96), np.uint8), np.ones(count, bool)

    def ours(some: int) -> tuple[float, np.ndarray]:
        began = time.process_time()
        kept = thin(some, [HashIndex(codes[:some], chroma[:some], known[:some], BITS)])
        return time.process_time() - began, kept

    some = min(COMPARED, count)
    same, found = ours(some)
    began = time.process_time()
    expected = _all_pairs(codes[:some])
    pairs = time.process_time() - began
    seconds, kept = ours(count)
    assert (kept != KEPT).sum() == len(codes[1::10])
    return {
        "seconds": seconds,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "compared": some,
        "all_pairs": pairs,
        "same": same,
        "scaled": pairs * (count / some) ** 2,
        "equal": bool((found == expected).all()),
    }


def _all_pairs(codes: np.ndarray) -> np.ndarray:
    """What `thin` says, by comparing each with all before it."""
    by = np.full(len(codes), KEPT)
    columns = np.ascontiguousarray(codes.T)
    for at in range(1, len(codes)):
        differing = sum(np.bitwise_count(frame[:at] ^ frame[at]) for frame in columns)
        near = np.flatnonzero((differing <= 3 * BITS) & (by[:at] == KEPT))
        if len(near):
            by[at] = near[0]
    return by


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=400, help="0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1_000_000, help="hashes to search among; 0: none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
