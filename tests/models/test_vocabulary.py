from __future__ import annotations

from pathlib import Path

from models.pack.train.text import build_tokenizer
from models.vocabulary import may_not_know, unknown_words


def test_words_that_fall_on_the_unknown_token_are_named_as_written_each_once(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["A", "red", "Cat", "cat,", "medium-sized", "circle", "café"]
    assert may_not_know(str(tmp_path))
    assert unknown_words(str(tmp_path), words) == ["Cat", "café"]


def test_a_long_text_is_looked_at_to_its_end(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert unknown_words(str(tmp_path), [" ".join(["red"] * 100 + ["cat"])]) == ["cat"]


def test_a_tokenizer_that_spells_bytes_knows_every_word(tiny_pack: Path) -> None:
    assert unknown_words(str(tiny_pack / "generator"), ["zorb", "\N{SNOWMAN}"]) == []


def test_a_checkpoint_without_a_tokenizer_file_has_no_unknown_words(tmp_path: Path) -> None:
    assert not may_not_know(str(tmp_path))
    assert unknown_words(str(tmp_path), ["cat"]) == []
