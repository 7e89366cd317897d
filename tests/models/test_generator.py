from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import UserError
from models.generator import Generator, GeneratorRef, load_generator
from models.noise import noise_key, standard_normal
from models.plan import SamplerPlan

Checkpoint = Callable[[str], str]
PLAN = SamplerPlan(num_inference_steps=2, guidance_scale=3.0, max_sequence_length=16)
VIDEO = (32, 32, 9)
IMAGE = (32, 32, 1)


@pytest.fixture
def wan(tiny_checkpoint: Checkpoint) -> str:
    return tiny_checkpoint("WanPipeline")


def latents_of(ref: GeneratorRef) -> np.ndarray:
    generator = Generator(ref)
    noise = standard_normal(noise_key(0, "a", 0), generator.latent_shape(*VIDEO))[None]
    return generator.sample(generator.encode(["a cat"], [""], [], PLAN), noise, PLAN, *VIDEO, 8.0)[0]


def test_ref_is_picklable_and_loads_once(wan: str) -> None:
    ref = GeneratorRef(wan)
    assert load_generator(pickle.loads(pickle.dumps(ref))) is load_generator(ref)


@pytest.mark.parametrize("part", ["encode", "sample", "decode"])
def test_parts_load_only_what_they_need(part: str, wan: str) -> None:
    generator = Generator(GeneratorRef(wan))
    generator.load(part)  # type: ignore[arg-type]
    (pipe,) = generator._pipes.values()
    here = {name for name in ("text_encoder", "transformer", "vae") if getattr(pipe, name) is not None}
    assert here == {"encode": {"text_encoder"}, "sample": {"transformer", "vae"}, "decode": {"vae"}}[part]


def test_a_video_is_decoded_bit_for_bit_but_never_there_whole(wan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(GeneratorRef(wan))
    vae = generator._pipe("decode").vae
    noise = np.random.default_rng(0).standard_normal((2, *generator.latent_shape(*VIDEO)), dtype=np.float32)
    with torch.inference_mode():
        mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        whole = vae.decode(torch.from_numpy(noise) * std + mean).sample
    expected = (whole / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    monkeypatch.setattr(vae, "_decode", None)
    np.testing.assert_array_equal(generator.decode(noise, *VIDEO), expected)


def test_parts_share_the_decoder(wan: str) -> None:
    generator = Generator(GeneratorRef(wan))
    for part in ("encode", "sample", "decode"):
        generator.load(part)  # type: ignore[arg-type]
    assert set(generator._pipes) == {"encode", "sample"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model_index.json").write_text("{"),
        lambda folder: (folder / "model_index.json").write_text("{}"),
        lambda folder: _truncate(next((folder / "transformer").glob("*.safetensors"))),
        lambda folder: next((folder / "transformer").glob("*.safetensors")).unlink(),
        lambda folder: (folder / "transformer" / "config.json").write_text("{}"),
    ],
    ids=["index", "no pipeline", "truncated", "no weights", "other shapes"],
)
def test_corrupt_checkpoint_is_one_line_that_names_the_key(
    damage: Callable[[Path], object], wan: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(wan, tmp_path / "wan"))
    damage(folder)
    with pytest.raises(UserError, match=r"^generators\.model: ") as error:
        Generator(GeneratorRef(str(folder))).load("sample")
    assert "\n" not in str(error.value)


def test_pickled_component_is_refused(wan: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(wan, tmp_path / "wan"))
    weights = next((folder / "transformer").glob("*.safetensors"))
    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"^generators\.model: "):
        Generator(GeneratorRef(str(folder))).load("sample")


def test_adapter_changes_the_result_by_its_weight(wan: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(next((Path(wan) / "transformer").glob("*.safetensors")))
    name = "blocks.0.attn1.to_q"
    out_features, in_features = weights[f"{name}.weight"].shape
    down = standard_normal(noise_key(1, "down", 0), (2, in_features))
    up = standard_normal(noise_key(1, "up", 0), (out_features, 2))
    file = tmp_path / "lora.safetensors"
    import torch

    save_file(
        {
            f"transformer.{name}.lora_A.weight": torch.from_numpy(down),
            f"transformer.{name}.lora_B.weight": torch.from_numpy(up),
        },
        file,
    )
    plain = latents_of(GeneratorRef(wan))
    none, one, two = (latents_of(GeneratorRef(wan, adapters=((str(file), weight),))) for weight in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(none, plain, atol=1e-5)
    assert np.abs(one - plain).max() > 1e-3
    assert np.abs(two - one).max() > 1e-3


def test_adapter_that_does_not_fit_is_named(wan: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"^generators\.adapters: "):
        Generator(GeneratorRef(wan, adapters=((str(file), 1.0),))).load("sample")


def test_bfloat16_keeps_the_decoder_in_float32(wan: str) -> None:
    import torch

    generator = Generator(GeneratorRef(wan, dtype="bfloat16"))
    generator.load("sample")
    pipe = generator._pipes["sample"]
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    np.testing.assert_allclose(latents_of(GeneratorRef(wan, dtype="bfloat16")), latents_of(GeneratorRef(wan)), atol=0.3)


def test_describe_says_what_the_pipeline_used(tiny_checkpoint: Checkpoint) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint("FluxPipeline")))
    assert "sigmas" not in generator.describe(PLAN, *IMAGE)
    noise = standard_normal(noise_key(0, "a", 0), generator.latent_shape(*IMAGE))[None]
    generator.sample(generator.encode(["a cat"], [""], [], PLAN), noise, PLAN, *IMAGE, 1.0)
    facts = generator.describe(PLAN, *IMAGE)
    # exp(mu) / (exp(mu) + 1/sigma - 1) at sigma 1 and 1/2; mu = 0.5 at 256 tokens, + 0.65/3840 a token
    mu = 0.5 + (64 - 256) * (1.15 - 0.5) / (4096 - 256)
    np.testing.assert_allclose(facts["sigmas"], [1.0, np.exp(mu) / (np.exp(mu) + 1), 0.0], atol=1e-6)
    assert facts["guidance"].startswith("w is an input")
    assert facts["latent_layout"] == "C H W"
    assert facts["latents"]["scaling_factor"] == 1.5035


def test_stochastic_scheduler_gives_a_sample_its_own_noise(tiny_checkpoint: Checkpoint) -> None:
    """CogVideoX's DPM scheduler draws noise at each step."""
    generator = Generator(GeneratorRef(tiny_checkpoint("CogVideoXPipeline")))
    shape = generator.latent_shape(*VIDEO)
    noise = np.stack([standard_normal(noise_key(0, prompt, 0), shape) for prompt in "ab"])
    conditions = generator.encode(["a cat", "a dog"], ["", ""], [], PLAN)
    forward, _ = generator.sample(conditions, noise, PLAN, *VIDEO, 8.0)
    turned = {name: value[::-1] for name, value in conditions.items()}
    backward, _ = generator.sample(turned, noise[::-1], PLAN, *VIDEO, 8.0)
    np.testing.assert_array_equal(forward, backward[::-1])


def test_run_whole_starts_from_the_samples_own_noise(tiny_checkpoint: Checkpoint) -> None:
    generator = Generator(GeneratorRef(tiny_checkpoint("StableDiffusionPipeline")))
    assert generator.family is None
    keys = [noise_key(0, prompt, 0) for prompt in "ab"]
    frames, nfe = generator.run_whole(["a cat", "a dog"], ["", "blurry"], keys, PLAN, *IMAGE, 1.0)
    assert frames.shape == (2, 1, 32, 32, 3)
    assert nfe == 4
    assert frames.std() > 1
    alone, _ = generator.run_whole(["a dog"], ["blurry"], keys[1:], PLAN, *IMAGE, 1.0)
    np.testing.assert_array_equal(alone[0], frames[1])
    np.testing.assert_array_equal(frames[0], _by_pipeline(tiny_checkpoint("StableDiffusionPipeline"), keys[0]))
    with pytest.raises(UserError, match="runs whole"):
        generator.latent_shape(*IMAGE)


def _by_pipeline(folder: str, key: str) -> np.ndarray:
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(standard_normal(key, (4, 16, 16)))[None]
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "np"}
    image = pipe("a cat", latents=latents, **arguments).images[0]
    return np.rint(image * 255).astype(np.uint8)[None]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
