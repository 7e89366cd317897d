"""Each family against its own pipeline, called the way diffusers documents it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from models.families import FAMILIES, family_of, table
from models.generator import Generator, GeneratorRef
from models.noise import noise_key, standard_normal
from models.plan import SamplerPlan

PROMPTS = ["a red circle bouncing", "the blue sea at night, seen from a hill above the town"]
NEGATIVE = ["", "blurry"]
PLAN = SamplerPlan(num_inference_steps=2, guidance_scale=3.0, max_sequence_length=16)
PICTURES = [np.full((32, 32, 3), value, dtype=np.uint8) for value in (40, 200)]
VIDEO = (32, 32, 9)
IMAGE = (32, 32, 1)

Checkpoint = Callable[[str], str]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline)
def test_family_makes_what_its_pipeline_makes(family: Any, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(family.pipeline)
    generator = Generator(GeneratorRef(folder))
    shape = IMAGE if family.media == "image" else VIDEO
    noise = _noise(generator, shape)
    conditions = generator.encode(PROMPTS, NEGATIVE, PICTURES if family.inputs else [], PLAN)
    latents, _ = generator.sample(conditions, noise, PLAN, *shape, 8.0)
    frames = generator.decode(latents, *shape)
    assert latents.shape == noise.shape
    assert frames.shape == (2, shape[2], 32, 32, 3)
    assert frames.std() > 1
    for row in range(2):
        expected = _by_pipeline(folder, family, row, noise[row], shape)
        np.testing.assert_allclose(frames[row].astype(float), expected * 255, atol=0.51)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline)
def test_family_conditions_do_not_depend_on_neighbours(family: Any, tiny_checkpoint: Checkpoint) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint(family.pipeline)))
    pictures = PICTURES if family.inputs else []
    both = generator.encode(PROMPTS, NEGATIVE, pictures, PLAN)
    swapped = generator.encode(PROMPTS[::-1], NEGATIVE[::-1], pictures[::-1], PLAN)
    for name, value in both.items():
        np.testing.assert_array_equal(value, swapped[name][::-1], err_msg=name)
    assert not np.array_equal(both["prompt_embeds"][0], both["prompt_embeds"][1])
    negatives = [name for name in both if name.startswith("negative_")]
    assert bool(negatives) == (family.guidance != "embedded")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline)
def test_family_counts_evaluations(family: Any, tiny_checkpoint: Checkpoint) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint(family.pipeline)))
    shape = IMAGE if family.media == "image" else VIDEO
    plan = SamplerPlan(num_inference_steps=2, guidance_scale=1.0, max_sequence_length=16)
    pictures = PICTURES if family.inputs else []
    noise = _noise(generator, shape)
    _, unguided = generator.sample(generator.encode(PROMPTS, NEGATIVE, pictures, plan), noise, plan, *shape, 8.0)
    _, guided = generator.sample(generator.encode(PROMPTS, NEGATIVE, pictures, PLAN), noise, PLAN, *shape, 8.0)
    assert unguided == 2
    assert guided == (2 if family.guidance == "embedded" else 4)


def test_cogvideox_1_5_pads_latent_frames(cogvideox_1_5: Path) -> None:
    family = family_of("CogVideoXPipeline")
    assert family is not None
    generator = Generator(GeneratorRef(str(cogvideox_1_5)))
    noise = _noise(generator, VIDEO)
    assert noise.shape[2] == 4  # three latent frames, padded to a multiple of two
    latents, _ = generator.sample(generator.encode(PROMPTS, NEGATIVE, [], PLAN), noise, PLAN, *VIDEO, 8.0)
    frames = generator.decode(latents, *VIDEO)
    expected = _by_pipeline(str(cogvideox_1_5), family, 0, noise[0], VIDEO)
    np.testing.assert_allclose(frames[0].astype(float), expected * 255, atol=0.51)


@pytest.mark.parametrize(
    ("pipeline", "shape", "words"),
    [
        ("WanPipeline", (40, 32, 9), "multiples of 16"),
        ("WanPipeline", (32, 32, 10), "4k+1"),
        ("LTXPipeline", (48, 32, 9), "multiples of 32"),
        ("FluxPipeline", (32, 32, 9), "num_frames must be 1"),
    ],
)
def test_check_names_the_bucket(
    pipeline: str, shape: tuple[int, int, int], words: str, tiny_checkpoint: Checkpoint
) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint(pipeline)))
    with pytest.raises(UserError, match=r"^buckets: ") as error:
        generator.check(PLAN, *shape)
    assert words in str(error.value)


def test_table_lists_each_family_and_the_rest() -> None:
    rows = table()
    assert [row["pipeline"] for row in rows] == [*(family.pipeline for family in FAMILIES), "*"]
    assert rows[-1]["trajectories"] == "no"


def _noise(generator: Generator, shape: tuple[int, int, int]) -> np.ndarray:
    latent_shape = generator.latent_shape(*shape)
    return np.stack([standard_normal(noise_key(0, prompt, 0), latent_shape) for prompt in PROMPTS])


def _by_pipeline(folder: str, family: Any, row: int, noise: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Frames [T, H, W, 3] in 0..1 from texts, by the whole pipeline."""
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    from models.arguments import step_noise

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"height": shape[0], "width": shape[1], "num_inference_steps": 2, "output_type": "np"}
    arguments |= {
        "HunyuanVideoPipeline": {"guidance_scale": 3.0, "max_sequence_length": 16},
        "CogVideoXPipeline": {"guidance_scale": 3.0, "max_sequence_length": 24},
        "FluxPipeline": {"guidance_scale": 3.0, "max_sequence_length": 16},
        "StableDiffusionXLPipeline": {"guidance_scale": 3.0},
        "SanaPipeline": {"guidance_scale": 3.0, "max_sequence_length": 16, "use_resolution_binning": False},
        "QwenImagePipeline": {"true_cfg_scale": 3.0, "max_sequence_length": 16},
    }.get(family.pipeline, {"guidance_scale": 3.0, "max_sequence_length": 16})
    if family.guidance != "embedded" and not (family.pipeline == "StableDiffusionXLPipeline" and not NEGATIVE[row]):
        arguments["negative_prompt"] = NEGATIVE[row]
    if family.media == "video":
        arguments["num_frames"] = shape[2]
    if family.pipeline == "LTXPipeline":
        arguments["frame_rate"] = 8
    if family.inputs:
        arguments["image"] = Image.fromarray(PICTURES[row])
    latents = family.pack(pipe, torch.from_numpy(noise[None].copy()))
    output = pipe(prompt=PROMPTS[row], latents=latents, generator=step_noise(noise), **arguments)[0]
    values = np.asarray(output[0])
    return values if values.ndim == 4 else values[None]
