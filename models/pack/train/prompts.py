"""Prompts of the training split, for a student of the pack's generator: distinct, as the denoiser was trained on them.

python -m models.pack.train.prompts --count 16000 > out/pack/prompts.txt
"""

from __future__ import annotations

import argparse

from models.pack.grammar import Kind, abridge, sample_scenes
from models.pack.phrases import describe
from models.pack.train.loop import stream

PLACE = 11_000_000
"""Of the random stream: no part of the pack draws from it."""

KINDS: tuple[Kind, ...] = ("one", "two", "two", "cut")
ABRIDGED = 0.2
SEED = 7


def training_prompts(count: int) -> list[str]:
    """`count` distinct prompts, one figure in a quarter of them, two in half, two shots in the rest."""
    rng = stream(SEED, PLACE)
    scenes = sample_scenes(rng, count * 3 // 2, split="train", kinds=KINDS)
    told = (describe(abridge(scene, rng) if rng.random() < ABRIDGED else scene, rng) for scene in scenes)
    return list(dict.fromkeys(told))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16_000, help="how many")
    print("\n".join(training_prompts(parser.parse_args().count)))


if __name__ == "__main__":
    main()
