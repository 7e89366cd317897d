"""A prompt that is a schedule of scenes: what each block of a video that DualParal samples is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from models.plan import SamplerPlan

if TYPE_CHECKING:
    from torch import Tensor

TEMPORAL = 4
"""Frames to a latent frame in Wan's VAE; its family alone is sampled in blocks."""


def scenes_of(prompt: str, separator: str) -> list[str]:
    """The texts between separators, without blanks around them; none is empty."""
    return [scene for part in prompt.split(separator) if (scene := part.strip())] or [prompt]


def encode_scenes(
    encode: Callable[[list[str], list[str]], dict[str, np.ndarray]],
    prompts: list[str],
    negative_prompts: list[str],
    separator: str,
) -> dict[str, np.ndarray]:
    """Embeddings of each scene: prompt_embeds [n, most scenes, tokens, width], filled up with zeros; scenes int64 [n], how
    many there are; negative_prompt_embeds [n, tokens, width] where `encode` gives them.

    The scenes of a prompt are encoded together, apart from other prompts: torch's last bits depend on the size of a batch.
    """
    parts = [scenes_of(prompt, separator) for prompt in prompts]
    rows = [encode(scenes, [negative] * len(scenes)) for scenes, negative in zip(parts, negative_prompts, strict=True)]
    shape = rows[0]["prompt_embeds"].shape[1:]
    embeds = np.zeros((len(rows), max(map(len, parts)), *shape), dtype=np.float32)
    for place, row in zip(embeds, rows, strict=True):
        place[: len(row["prompt_embeds"])] = row["prompt_embeds"]
    conditions = {name: np.stack([row[name][0] for row in rows]) for name in rows[0]}
    return conditions | {"prompt_embeds": embeds, "scenes": np.array([len(scenes) for scenes in parts])}


def texts_of(
    embeds: Mapping[str, Tensor], plan: SamplerPlan, blocks: int, at: int, block: int
) -> tuple[Tensor, Tensor]:
    """What a block of sample `at` is conditioned on, of conditions as encoded: embeddings with the prompt and without, each
    [1, tokens, width]."""
    own = embeds["prompt_embeds"][at]
    if plan.scenes is not None:
        own = blend(own[: int(embeds["scenes"][at])], block, blocks, plan.scenes[1])
    negative = embeds.get("negative_prompt_embeds")
    return own[None], own[None] if negative is None else negative[at : at + 1]


def blend(scenes: Tensor, block: int, blocks: int, fade: float) -> Tensor:
    """The embeddings [tokens, width] of a block, of scenes [s, tokens, width] that share the video's blocks evenly.

    Over `fade` blocks, at most as many as a scene has, a scene gives way to the next linearly: a cross-fade of embeddings.
    """
    share = blocks / len(scenes)
    middle = block + 0.5
    at = min(max(round(middle / share), 1), len(scenes) - 1)
    fade = min(fade, share)
    past = middle - at * share
    later = 0.5 + past / fade if abs(past) < fade / 2 else float(past >= 0)
    if later in (0, 1) or len(scenes) == 1:
        return scenes[min(int(middle / share), len(scenes) - 1)]
    return scenes[at - 1] + later * (scenes[at] - scenes[at - 1])


def frames_of_scenes(prompt: str, num_frames: int, plan: Mapping[str, Any]) -> list[range]:
    """Which frames of a video show each scene of its prompt, by what SamplerPlan.to_json says; none where there is one scene.

    A scene's are those of the blocks in which it has the greater part. Where the blocks do not come out even, as in a
    sample that some other way was made, scenes share the frames evenly.
    """
    scenes, (frames, context) = len(scenes_of(prompt, plan["scenes"][0])), plan["blocks"]
    if scenes < 2 or scenes > num_frames:
        return []
    count, rest = divmod((num_frames - 1) // TEMPORAL + 1 - context, frames)
    if rest or count < scenes:
        bounds = [num_frames * at // scenes for at in range(scenes + 1)]
    else:
        shown = [min(int((block + 0.5) * scenes / count), scenes - 1) for block in range(count)]
        starts = [
            context + frames * shown.index(at) for at in range(1, scenes)
        ]  # the first block is longer by the context
        bounds = [0, *(TEMPORAL * (start - 1) + 1 for start in starts), num_frames]
    return [range(start, stop) for start, stop in pairwise(bounds)]
