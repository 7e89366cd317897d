"""What the plain values of a spec may be at all, before anybody asks what they mean.

A lone surrogate, a NUL in a path, a number of 5,000 digits or a list a thousand deep is no spec's business, and each of them
makes some library further on fail in words of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from infra.errors import UserError
from infra.printable import printable

DEEPEST = 64
MOST_VALUES = 1_000_000
MOST_BITS = 1024

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NO_UNICODE = re.compile("[\ud800-\udfff]")


class Odd:
    """In the place of a key that is no text."""

    def __str__(self) -> str:
        return "a key"


Key = tuple[str | int | Odd, ...]


def check_values(data: Any, source: str) -> None:
    """UserError for the first value that no spec may hold. Prompts are left alone but for what UTF-8 cannot hold."""
    for count, (key, value) in enumerate(_walk(data)):
        found = _trouble(key, value) if count < MOST_VALUES else f"expected at most {MOST_VALUES:,} values"
        if found:
            name = ".".join(str(part)[:40] for part in key[:8]) or "spec"
            raise UserError(f"{source}: {printable(' '.join(name.split()))}: {found}")


def _trouble(key: Key, value: Any) -> str:
    if len(key) > DEEPEST:
        return f"is nested more than {DEEPEST} deep; make it flat"
    if key and isinstance(key[-1], Odd):
        found = "a large number" if isinstance(value, int) and value.bit_length() > MOST_BITS else repr(value)[:60]
        return f"expected a text, found {found}; put it in quotes"
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"expected a number of at most {MOST_BITS} bits, found one of {value.bit_length():,}"
    if isinstance(value, str):
        is_prompt = key[:2] == ("prompts", "inline")
        if match := (_NO_UNICODE if is_prompt else _NO_TEXT).search(value):
            wanted = "Unicode text" if is_prompt else "Unicode text without NUL"
            return f"expected {wanted}, found \\x{ord(match[0]):02x} at character {match.start()}; take it out"
    return ""


def _walk(data: Any) -> Iterator[tuple[Key, Any]]:
    """Each key and value, with where it stands; never below what is too deep, so that what holds itself ends."""
    todo: list[tuple[Key, Any]] = [((), data)]
    while todo:
        key, value = todo.pop()
        yield key, value
        if len(key) > DEEPEST:
            continue
        if isinstance(value, dict):
            for name in value:
                yield (*key, "a key" if isinstance(name, str) else Odd()), name
            todo += [((*key, name), inner) for name, inner in value.items() if isinstance(name, str)]
        elif isinstance(value, (list, tuple, set)):
            todo += [((*key, at), inner) for at, inner in enumerate(value)]
