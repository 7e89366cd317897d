from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra.errors import UserError
from models.generator import GeneratorRef
from models.noise import standard_normal
from models.plan import SamplerPlan
from stages.batch import Batch, take
from stages.encode import EncodeText
from stages.sample import SampleLatents

Planned = Callable[..., Batch]
PLAN = SamplerPlan(num_inference_steps=3)
REPO = Path(__file__).parents[2]


def latents_of(folder: str, batch: Batch, plan: SamplerPlan = PLAN, batch_size: int = 8) -> Batch:
    refs = (GeneratorRef(folder),)
    return SampleLatents(refs, plan, batch_size)(EncodeText(refs, plan, batch_size)(batch))


@pytest.fixture(scope="module")
def folder(tiny_pack: Path) -> str:
    return str(tiny_pack / "generator")


def test_sample_adds_latents_nfe_and_plan(folder: str, planned: Planned) -> None:
    result = latents_of(folder, planned(2))
    assert result["latents"].shape == (2, 16, 5, 8, 8)
    assert result["latents"].dtype == np.float32
    assert result["nfe"].tolist() == [6, 6]
    facts = json.loads(result["plan_json"][0])
    assert facts["scheduler"] == "UniPCMultistepScheduler"
    assert len(facts["timesteps"]) == 3
    assert facts["sigmas"][-1] == 0
    assert facts["guidance"] == "u + w * (c - u)"
    assert facts["latent_layout"] == "C T H W"
    assert facts["latents"]["shape"] == [16, 5, 8, 8]
    assert facts["plan"] == json.loads(PLAN.to_json())
    assert facts["max_sequence_length"] == 64


@pytest.mark.parametrize("rows", [[0], [2, 1, 0], [7, 3, 5, 1, 0, 2, 6, 4], [3, 3, 3]])
def test_sample_gives_the_same_bits_in_any_slot_beside_any_neighbour(
    rows: list[int], folder: str, planned: Planned
) -> None:
    batch = planned(8)
    whole = latents_of(folder, batch)["latents"]
    part = latents_of(folder, take(batch, np.array(rows)))["latents"]
    np.testing.assert_array_equal(part, whole[rows])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sample_is_close_at_another_batch_size(batch_size: int, folder: str, planned: Planned) -> None:
    batch = planned(batch_size)
    np.testing.assert_allclose(
        latents_of(folder, batch, batch_size=batch_size)["latents"],
        latents_of(folder, batch, batch_size=8)["latents"],
        atol=1e-4,
        rtol=0,
    )


def test_sample_gives_the_same_bits_after_a_restart(folder: str, planned: Planned) -> None:
    here = latents_of(folder, planned(3))["latents"]
    script = f"""
import hashlib, pickle, sys
from models.generator import GeneratorRef
from models.plan import SamplerPlan
from stages.encode import EncodeText
from stages.sample import SampleLatents
refs, plan = (GeneratorRef({folder!r}),), SamplerPlan(num_inference_steps=3)
batch = pickle.load(sys.stdin.buffer)
stages = EncodeText(refs, plan, 8), SampleLatents(refs, plan, 8)
for stage in stages:
    stage.load()
    batch = stage(batch)
print(hashlib.sha256(batch["latents"].tobytes()).hexdigest())
"""
    import pickle

    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(planned(3)), capture_output=True, check=True, cwd=REPO
    )
    assert done.stdout.decode().strip() == hashlib.sha256(here.tobytes()).hexdigest()


def test_sample_starts_two_plans_from_the_same_noise(
    folder: str, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.generator import load_generator

    generator, seen = load_generator(GeneratorRef(folder)), []
    sample = generator.sample

    def spy(conditions: dict[str, np.ndarray], noise: np.ndarray, *rest: object) -> tuple[np.ndarray, int]:
        seen.append(noise.copy())
        return sample(conditions, noise, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(generator, "sample", spy)
    batch = planned(2)
    a = latents_of(folder, batch, PLAN)["latents"]
    b = latents_of(folder, batch, SamplerPlan(scheduler="euler", num_inference_steps=4, guidance_scale=1.0))["latents"]
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0][1], standard_normal(batch["noise_key"][1], (16, 5, 8, 8)))
    assert not np.array_equal(a, b)


def test_sample_fails_nan_latents_and_leaves_the_rest(folder: str, planned: Planned) -> None:
    refs = (GeneratorRef(folder),)
    encoded = EncodeText(refs, PLAN, 8)(planned(3))
    well = SampleLatents(refs, PLAN, 8)(encoded)
    poisoned = {**encoded, "cond.prompt_embeds": encoded["cond.prompt_embeds"].copy()}
    poisoned["cond.prompt_embeds"][1, 0, 0] = np.nan
    result = SampleLatents(refs, PLAN, 8)(poisoned)
    assert list(result["error_type"]) == ["", "nan_latents", ""]
    assert not result["latents"][1].any()
    for row in (0, 2):
        np.testing.assert_array_equal(result["latents"][row], well["latents"][row])


def test_sample_depends_on_prompt_noise_and_guidance(folder: str, planned: Planned) -> None:
    batch = planned(2)
    base = latents_of(folder, batch)["latents"]
    other_prompt = latents_of(folder, planned(2, prompt=["a red circle bouncing", "a red square"]))["latents"]
    other_guidance = latents_of(folder, batch, SamplerPlan(num_inference_steps=3, guidance_scale=2.0))["latents"]
    np.testing.assert_array_equal(base[0], other_prompt[0])
    assert np.abs(base[1] - other_prompt[1]).max() > 0.1
    assert np.abs(base - other_guidance).max() > 0.1


def test_sample_follows_each_samples_own_first_frame(
    tiny_image_to_video: str, planned: Planned, tmp_path: Path
) -> None:
    from PIL import Image

    inputs = []
    for at, colour in enumerate(((200, 30, 30), (30, 30, 200))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{at}.png")
        inputs.append(json.dumps([{"role": "first_frame", "uri": str(tmp_path / f"{at}.png")}]))
    batch = planned(2, inputs=inputs)
    both = latents_of(tiny_image_to_video, batch)["latents"]
    swapped = latents_of(tiny_image_to_video, {**batch, "inputs": batch["inputs"][::-1]})["latents"]
    alone = latents_of(tiny_image_to_video, take(batch, np.array([1])))["latents"]
    np.testing.assert_array_equal(alone[0], both[1])
    assert np.abs(both - swapped).max() > 0.01


def test_sample_refuses_a_plan_when_it_loads(folder: str) -> None:
    with pytest.raises(UserError, match=r"^sampler\.scheduler: ddim"):
        SampleLatents((GeneratorRef(folder),), SamplerPlan(scheduler="ddim"), 8).load()


def test_sample_refuses_a_shape(folder: str, planned: Planned) -> None:
    with pytest.raises(UserError, match=r"^buckets: "):
        latents_of(folder, planned(1, num_frames=[16]))


def test_sample_says_what_techniques_saved_of_each_sample(folder: str, planned: Planned) -> None:
    technique = json.dumps({"technique": "first_block", "threshold": 10.0})
    result = latents_of(folder, planned(3), replace(PLAN, accelerate=(technique,)))
    facts = [json.loads(text) for text in result["accelerated"]]
    assert len(facts) == 3
    # Of five blocks, in two of three steps, all but the first are skipped.
    assert facts[0]["skipped"] == pytest.approx(2 * 4 / 15, abs=1e-6)
    assert facts[0]["block_evaluations"] == 2 * 3 * 5
    assert "accelerated" not in latents_of(folder, planned(3))


def test_sample_refuses_techniques_when_it_loads(folder: str) -> None:
    plan = replace(PLAN, accelerate=(json.dumps({"technique": "guidance_reuse"}),))
    with pytest.raises(UserError, match=r"^sampler\.accelerate: guidance_reuse: sampler\.guidance_scale is 1"):
        SampleLatents((GeneratorRef(folder),), replace(plan, guidance_scale=1.0), 8).load()
