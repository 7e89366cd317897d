"""What language and multimodal models have in common: a tokenizer that pads on the left, and text that opens no turn."""

from __future__ import annotations

from typing import Any


def prepare(tokenizer: Any) -> None:
    """Pad on the left, so that every row's answer starts at the same position."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Tokens that structure a conversation: a prompt that spells one must not open a turn or an image."""
    added = (token for token in tokenizer.get_added_vocab() if token.startswith(("<", "[")))
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


def plain_text(text: str, control: tuple[str, ...]) -> str:
    """`text` without control tokens and without what is no Unicode (lone surrogates)."""
    text = text.encode("utf-8", "replace").decode()
    for token in control:
        text = text.replace(token, " ")
    return text


def starts_itself(tokenizer: Any, conversation: str) -> bool:
    """Whether a chat template has written the first token that the tokenizer would add once more."""
    return bool(tokenizer.bos_token) and conversation.startswith(tokenizer.bos_token)


def explain(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
