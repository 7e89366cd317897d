from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from models.pack.tiny_language import WORDS, build_expander, build_judge, build_tokenizer

GOLDEN = {
    "judge": "e9265d4b427e9680afc3f4b2d3f0e2d751b11c1b2cb5d98e09a4d150442d349c",
    "expander": "a85aeb0c6546bf0aba25bc08af86a9088cadb90a2c1ed8952440c78a6d1f4ca6",
}
"""sha256 over the weights by name: the pack is the same on every machine."""


@pytest.mark.parametrize(("part", "build"), [("judge", build_judge), ("expander", build_expander)])
def test_pack_is_written_the_same_each_time(part, build, tiny_pack: Path, tmp_path: Path):
    build(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(path.name for path in (tiny_pack / part).iterdir())
    for name in files:
        assert (tmp_path / name).read_bytes() == (tiny_pack / part / name).read_bytes(), name


@pytest.mark.parametrize("part", ["judge", "expander"])
def test_pack_weights_match_their_golden_hash(part, tiny_pack: Path):
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(tiny_pack / part / "model.safetensors").items()):
        digest.update(name.encode() + weight.astype("<f4").tobytes())
    assert digest.hexdigest() == GOLDEN[part]


@pytest.mark.parametrize("part", ["judge", "expander"])
def test_pack_states_its_licence_and_holds_no_pickle(part, tiny_pack: Path):
    assert "\nlicense: apache-2.0\n" in (tiny_pack / part / "README.md").read_text()
    assert not [path for path in (tiny_pack / part).iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("text", ["a red circle", "日本語 émoji 🎬", "tabs\tand\nlines", "\x00\x7f", "Yes No  Yes"])
def test_tokenizer_round_trips_any_text(text):
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_has_one_token_for_each_word():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.encode(text)) == 1 for word in WORDS for text in (word, f" {word}"))
