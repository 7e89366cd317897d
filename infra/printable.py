"""Text that came from elsewhere (a prompt, a file's name, a server's answer), made fit for a terminal."""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Control characters but tab and line feed, what is not seen, what turns the direction of writing, and half characters."""


def printable(text: object) -> str:
    """The text with what steers a terminal, or is not seen, as \\xNN; lines and tabs stay."""
    return _UNSEEN.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
