"""Differential token drop: what a frame shows again where a frame before has shown it is not read twice.

TimeChat-Online (arXiv:2504.17343), by pixels: a vision token is left out where the pixels under it barely differ from those
of the last token that was read at that place. (The paper compares with the frame before, so that what changes slowly enough
is never read again.) The first frame is read whole. Positions of three axes (Qwen-VL) stay as they are; those of one axis
close up, which cost the pack's judge less than gaps did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.errors import UserError

if TYPE_CHECKING:
    import torch


def read_tokens(clip: np.ndarray, per_frame: int, threshold: float) -> np.ndarray:
    """Which vision tokens of a clip are read, bool [T, per_frame].

    As many as some number of whole frames have: beside those above the threshold the next ones, so that clips with about as
    much in them are read together. That depends on nothing but the clip.

    Args:
        clip: uint8 [T, H, W, 3].
        per_frame: vision tokens of a frame, a grid of about the frame's shape in rows.
        threshold: mean absolute difference of the pixels under a token, 0 to 1, up to which it is left out.

    Raises UserError where the tokens make no such grid.
    """
    cells, number = _cells(clip.shape[1], clip.shape[2], per_frame), len(clip) * per_frame
    sizes = 3 * 255 * np.bincount(cells.ravel(), minlength=per_frame)
    change = np.full((len(clip), per_frame), np.inf)
    last = clip[0].astype(np.int16)
    for at in range(1, len(clip)):
        apart = np.abs(clip[at] - last).sum(axis=-1)
        change[at] = np.bincount(cells.ravel(), weights=apart.ravel(), minlength=per_frame) / sizes
        last = np.where((change[at] > threshold)[cells][..., None], clip[at], last)
    count = -(-int((change > threshold).sum()) // per_frame) * per_frame
    read = np.zeros(number, dtype=bool)
    read[np.argsort(-change.ravel(), kind="stable")[:count]] = True
    return read.reshape(change.shape)


def _cells(height: int, width: int, per_frame: int) -> np.ndarray:
    """The token over each pixel, int [height, width], row by row."""
    fits = [rows for rows in range(1, per_frame + 1) if per_frame % rows == 0]
    rows = min(fits, key=lambda rows: abs(np.log(rows * rows * width / (per_frame * height))))
    cols = per_frame // rows
    if max(rows * width, cols * height) > 2 * min(rows * width, cols * height):
        raise UserError(
            f"judge.token_drop, caption.token_drop: the model makes {per_frame} tokens of a frame of {width}x{height}, "
            "which are no grid; set 0"
        )
    return (np.arange(height) * rows // height)[:, None] * cols + np.arange(width) * cols // width


@contextlib.contextmanager
def only(model: Any, columns: torch.Tensor) -> Iterator[None]:
    """While open, the language model of `model` gets only these of its input tokens, int64 [rows, kept].

    Raises UserError for a family that hands its language model more than embeddings of tokens.
    """
    import torch

    calls = []

    def cut(_: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds, positions = given["inputs_embeds"], given.get("position_ids")
        others = [
            name for name, value in given.items() if name not in TAKEN and isinstance(value, (torch.Tensor, list))
        ]
        if arguments or others:
            raise UserError(
                "judge.token_drop, caption.token_drop: cannot be used with this model, which reads vision tokens in several "
                f"layers ({', '.join(others)}); set 0"
            )
        calls.append(embeds.shape)
        if positions is not None:
            positions = positions.gather(-1, columns.expand(*positions.shape[:-1], -1))
        return arguments, given | {
            "inputs_embeds": embeds.gather(1, columns[..., None].expand(-1, -1, embeds.shape[-1])),
            "position_ids": positions,
            "attention_mask": torch.ones_like(columns),
        }

    handle = model.get_decoder().register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    assert calls, "the model's decoder was not called"


TAKEN = {"inputs_embeds", "position_ids", "attention_mask", "cache_position"}
"""What a language model is handed that can be cut to some tokens, or follows from them."""
