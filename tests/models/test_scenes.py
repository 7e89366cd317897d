"""A prompt as a schedule of scenes: which block is conditioned on what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.scenes import blend, encode_scenes, scenes_of


def test_a_prompt_is_cut_at_its_separators():
    assert scenes_of("a red circle || a blue star ||", "||") == ["a red circle", "a blue star"]
    assert scenes_of("a red circle", "||") == ["a red circle"]
    assert scenes_of("||", "||") == ["||"]


@pytest.mark.parametrize(
    ("scenes", "blocks", "fade", "weights"),
    [
        (2, 6, 0, [0, 0, 0, 1, 1, 1]),
        (2, 6, 2, [0, 0, 0.25, 0.75, 1, 1]),
        (2, 6, 99, [0, 0, 1 / 3, 2 / 3, 1, 1]),  # at most as long as a scene
        (3, 3, 0, [0, 1, 2]),
        (3, 6, 2, [0, 0.25, 0.75, 1.25, 1.75, 2]),
        (3, 4, 0, [0, 1, 1, 2]),
        (1, 4, 2, [0, 0, 0, 0]),
    ],
)
def test_scenes_share_the_blocks_and_fade_into_each_other(scenes, blocks, fade, weights):
    embeds = torch.arange(float(scenes)).reshape(scenes, 1, 1)
    assert [float(blend(embeds, block, blocks, fade)) for block in range(blocks)] == pytest.approx(weights)


def test_a_sample_is_encoded_apart_from_its_neighbours():
    asked = []

    def encode(prompts: list[str], negatives: list[str]) -> dict[str, np.ndarray]:
        asked.append((prompts, negatives))
        lengths = np.array([len(prompt) for prompt in prompts], np.float32).reshape(-1, 1, 1)
        return {"prompt_embeds": lengths, "negative_prompt_embeds": -lengths}

    found = encode_scenes(encode, ["a|bb|ccc", "dddd"], ["x", "y"], "|")
    assert asked == [(["a", "bb", "ccc"], ["x"] * 3), (["dddd"], ["y"])]
    assert found["prompt_embeds"][:, :, 0, 0].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert found["negative_prompt_embeds"].shape == (2, 1, 1)
    assert found["scenes"].tolist() == [3, 1]
