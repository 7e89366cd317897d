"""A prompt as a schedule of scenes: which block is conditioned on what."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models.plan import SamplerPlan
from models.scenes import blend, encode_scenes, frames_of_scenes, scenes_of


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


@pytest.mark.parametrize(
    ("prompt", "num_frames", "blocks", "starts"),
    [
        ("a|b", 17, (2, 1), [0, 9]),  # latent frames 0-2 and 3-4: frames 0-8 and 9-16
        ("a|b|c", 25, (2, 1), [0, 9, 17]),
        ("a|b|c", 33, (2, 1), [0, 9, 25]),  # four blocks: 1, 2 and 1 of them, as the blend has it without a fade
        ("a|b", 16, (3, 1), [0, 8]),  # not made in blocks: shared evenly
        ("a|b|c", 2, (2, 1), []),
        ("a", 17, (2, 1), []),
    ],
)
def test_frames_of_scenes_are_those_of_their_blocks(prompt, num_frames, blocks, starts):
    plan = SamplerPlan(blocks=blocks, scenes=("|", 0.0))
    parts = frames_of_scenes(prompt, num_frames, json.loads(plan.to_json()))
    assert [part.start for part in parts] == starts
    assert [at for part in parts for at in part] == (list(range(num_frames)) if starts else [])


def test_frames_of_a_scene_are_of_blocks_that_are_conditioned_on_it():
    for count in range(2, 9):
        for scenes in range(2, count + 1):
            prompt, frames = "|".join("abcdefgh"[:scenes]), 4 * (2 * count) + 1
            parts = frames_of_scenes(prompt, frames, {"scenes": ["|", 0], "blocks": [2, 1]})
            for block in range(count):
                first = 4 * (2 * block + 1 - 1) + 1 if block else 0
                (shown,) = [at for at, part in enumerate(parts) if first in part]
                values = torch.arange(scenes, dtype=torch.float32)[:, None, None]
                assert blend(values, block, count, 0.0).item() == shown
