"""Which words a generator's tokenizer does not know: to its text encoder they are all one and the same, `<unk>`.

Reads tokenizer.json by itself, so that a driver needs neither torch nor transformers for it. A checkpoint without that file,
or whose tokenizer spells what it does not know in bytes, has no unknown words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any


def unknown_words(folder: str, words: Iterable[str]) -> list[str]:
    """The pieces of `words` that a tokenizer of the checkpoint in `folder` maps to its unknown token, each once, in order.

    A word is looked at by itself; what is unknown of it is named as it is written: `cat` of `cat,`.
    """
    found: dict[str, str] = {}
    for word in words:
        for tokenizer, unknown in _tokenizers(folder):
            encoding = tokenizer.encode(word, add_special_tokens=False)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                piece = word[start:end].strip()
                if token == unknown and piece:
                    found.setdefault(piece.casefold(), piece)
    return list(found.values())


def may_not_know(folder: str) -> bool:
    """Whether there can be words that `unknown_words` would find."""
    return bool(_tokenizers(folder))


@cache
def _tokenizers(folder: str) -> tuple[tuple[Any, int], ...]:
    """The tokenizers of a pipeline that have an unknown token, and its id."""
    from tokenizers import Tokenizer

    made = []
    for path in sorted(Path(folder).glob("tokenizer*/tokenizer.json")):
        tokenizer = Tokenizer.from_file(str(path))
        name = _unknown_token(path.with_name("tokenizer_config.json"))
        unknown = None if name is None else tokenizer.token_to_id(name)
        if unknown is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            made.append((tokenizer, unknown))
    return tuple(made)


def _unknown_token(config: Path) -> str | None:
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("unk_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token
