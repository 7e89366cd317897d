"""Assembling: the parts that are there become a pack, the rest is named and left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.licences import licence_of
from models.pack.train.assemble import assemble
from models.pack.train.text import build_encoder, build_tokenizer


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """What the training scripts write, with random weights of a small denoiser."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from models.pack.train.denoiser import CONFIG
    from models.pack.train.vae import CONFIG as VAE

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "denoiser" / "tokenizer")
    build_encoder(tokenizer).save_pretrained(tmp_path / "denoiser" / "text_encoder")
    WanTransformer3DModel(**{**CONFIG, "num_layers": 1}).save_pretrained(tmp_path / "denoiser" / "transformer")
    AutoencoderKLWan(**VAE).save_pretrained(tmp_path / "vae")
    return tmp_path


def test_a_pack_is_made_of_what_is_there(parts: Path, tiny_pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import WanPipeline

    pack = parts / "shapes"
    assemble(parts, pack, judge=parts / "judge", expander=tiny_pack / "expander")
    said = capsys.readouterr().out
    assert "judge: not there" in said and "generator: not there" not in said
    assert sorted(path.name for path in pack.iterdir()) == ["expander", "generator"]
    pipe = WanPipeline.from_pretrained(pack / "generator", torch_dtype=torch.float16)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float16}
    assert licence_of(str(pack / "generator"), "pack://shapes").may_train == "yes"
    assert (pack / "expander" / "config.json").exists()


def test_a_part_that_is_made_anew_leaves_nothing_of_the_old_one(parts: Path, tiny_pack: Path) -> None:
    pack = parts / "shapes"
    for part in ("judge", "expander"):
        (pack / part).mkdir(parents=True)
        (pack / part / "old.safetensors").write_bytes(b"old")
    assemble(parts / "nothing", pack, judge=parts / "nowhere", expander=tiny_pack / "expander")
    assert not (pack / "expander" / "old.safetensors").exists()
    assert (pack / "judge" / "old.safetensors").exists()
    assert not (pack / "generator").exists()
