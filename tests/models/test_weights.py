"""A checkpoint that lacks weights is refused, whichever library would load it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from infra.errors import UserError
from models.generator import Generator, GeneratorRef, load_generator
from models.language import LanguageRef, load_language
from models.multimodal import MultimodalRef, load_multimodal


def _generator(path: str) -> Generator:
    return load_generator(GeneratorRef(path))


@pytest.mark.parametrize(
    ("folder", "weight", "load", "key"),
    [
        ("generator/text_encoder", "wi_0", lambda path: _generator(path).load("encode"), "generators.model"),
        ("generator/transformer", "ffn", lambda path: _generator(path).load("sample"), "generators.model"),
        ("generator/vae", "conv_in", lambda path: _generator(path).load("decode"), "generators.model"),
        ("judge", "mlp", lambda path: load_multimodal(MultimodalRef(path)), "judge.model"),
        ("expander", "mlp", lambda path: load_language(LanguageRef(path)), "prompts.expand.model"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else None,
)
def test_a_checkpoint_without_one_of_its_weights_is_refused(
    folder: str, weight: str, load: Callable[[str], object], key: str, tiny_pack: Path, tmp_path: Path
) -> None:
    model, _, part = folder.partition("/")
    shutil.copytree(tiny_pack / model, tmp_path / model)
    load(str(tiny_pack / model))  # nothing is missing there
    (file,) = (tmp_path / model / part).glob("*.safetensors")
    weights = load_file(file)
    lost = next(name for name in weights if weight in name)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{key}.*1 missing .*{weight}.*fetch it again"):
        load(str(tmp_path / model))
