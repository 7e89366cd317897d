from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.generator import GeneratorRef
from models.plan import SamplerPlan
from stages.batch import Batch, take
from stages.decode import DecodeLatents
from stages.encode import EncodeText
from stages.sample import SampleLatents

Planned = Callable[..., Batch]
PLAN = SamplerPlan(num_inference_steps=3)


@pytest.fixture(scope="module")
def refs(tiny_pack: Path) -> tuple[GeneratorRef, ...]:
    return (GeneratorRef(str(tiny_pack / "generator")),)


def test_decode_adds_frames_with_something_to_see(refs: tuple[GeneratorRef, ...], planned: Planned) -> None:
    batch = SampleLatents(refs, PLAN, 8)(EncodeText(refs, PLAN, 8)(planned(2)))
    frames = DecodeLatents(refs, PLAN, 8)(batch)["frames"]
    assert frames.shape == (2, 17, 64, 64, 3)
    assert frames.dtype == np.uint8
    values = frames.astype(float)
    assert values.std(axis=(1, 2, 3, 4)).min() > 10  # structure in each
    assert np.abs(np.diff(values, axis=1)).mean() > 1  # motion
    assert np.abs(values[0] - values[1]).mean() > 5  # and they differ


@pytest.mark.parametrize("rows", [[0], [2, 1, 0]])
def test_decode_gives_the_same_bits_in_any_slot(
    rows: list[int], refs: tuple[GeneratorRef, ...], planned: Planned
) -> None:
    batch = planned(4) | {"latents": np.random.default_rng(0).standard_normal((4, 16, 5, 8, 8), dtype=np.float32)}
    decode = DecodeLatents(refs, PLAN, 8)
    np.testing.assert_array_equal(decode(take(batch, np.array(rows)))["frames"], decode(batch)["frames"][rows])


def test_decode_loads_without_the_denoiser(refs: tuple[GeneratorRef, ...]) -> None:
    from models.families import family_of
    from models.loading import load_pipeline

    pipe = load_pipeline(refs[0], family_of("WanPipeline"), "decode")
    assert pipe.transformer is None and pipe.text_encoder is None and pipe.vae is not None


def test_a_pipeline_of_no_family_goes_through_all_three_stages(tiny_whole: str, planned: Planned) -> None:
    refs = (GeneratorRef(tiny_whole),)
    batch = planned(2, height=[32, 32], width=[32, 32], num_frames=[1, 1])
    stages = EncodeText(refs, PLAN, 4), SampleLatents(refs, PLAN, 4), DecodeLatents(refs, PLAN, 4)
    for stage in stages:
        stage.load()
        batch = stage(batch)
    assert batch["frames"].shape == (2, 1, 32, 32, 3)
    assert batch["nfe"].tolist() == [6, 6]
    assert "latents" not in batch
