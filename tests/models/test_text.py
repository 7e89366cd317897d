from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from models.families import FAMILIES
from models.generator import Generator, GeneratorRef
from models.noise import noise_key, standard_normal
from models.plan import SamplerPlan
from models.text import NEGATIVE, encoder_sha256, encoding_of, padded_text, text_of

Checkpoint = Callable[[str], str]
PLAN = SamplerPlan(num_inference_steps=2, guidance_scale=3.0, max_sequence_length=48)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline)
def test_what_is_kept_of_a_text_conditions_as_the_text_did(family, tiny_checkpoint: Checkpoint) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint(family.pipeline)))
    shape = (32, 32, 9 if family.media == "video" else 1)
    images = [np.full((*shape[:2], 3), 90, np.uint8)] if family.inputs else []
    conditions = generator.encode(["a cat"], ["blurry"], images, PLAN)
    again = dict(conditions)
    for negative, prefix in ((False, ""), (True, NEGATIVE)):
        kept = text_of(family, conditions, 0, negative)
        assert bool(kept) == (not negative or family.uses_negative(PLAN.guidance_scale))
        if kept:
            tokens = conditions["prompt_embeds"].shape[1]
            assert len(kept["prompt_embeds"]) < tokens or not (family.zero_pads or any("mask" in name for name in kept))
            padded = padded_text(kept, tokens)
            again |= {
                prefix + name: value[None].astype(conditions[prefix + name].dtype) for name, value in padded.items()
            }
    assert set(again) == set(conditions)
    noise = standard_normal(noise_key(0, "a", 0), generator.latent_shape(*shape))[None]
    first, second = (generator.sample(given, noise, PLAN, *shape, 8.0)[0] for given in (conditions, again))
    np.testing.assert_allclose(second, first, atol=1e-5)
    if family.zero_pads:
        np.testing.assert_array_equal(second, first)


def test_an_encoding_names_what_decides_it(tiny_checkpoint: Checkpoint) -> None:
    ref = GeneratorRef(tiny_checkpoint("WanPipeline"))
    said = encoding_of(Generator(ref), PLAN)
    assert (said.family, said.max_sequence_length, said.dtype) == ("Wan text-to-video", 24, "float32")
    assert said.encoder_sha256 == encoder_sha256(ref) != encoder_sha256(GeneratorRef(tiny_checkpoint("LTXPipeline")))
