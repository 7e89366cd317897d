"""Bars and borders around the picture of a clip, told from scenes that are dark or plain.

A bar is rows of one colour, the same in all frames, at whose edge the picture begins at once and over most of its width. A
plain sky or a night has rows of one colour too, but what stands in them begins here and there: there is no straight edge, and
nothing is cropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVELS = 24
"""Pixels that differ from a bar's colour by at most so many levels (0-255) in every channel are of it, as for ffmpeg's
cropdetect: codecs ring at edges."""
SPECKS = 0.01
"""Share of a bar's row that may differ all the same."""
EDGE = 0.5
"""Share of the first row of the picture that differs from the bar in some frame."""
SOFT = 8
"""Rows between a bar and the picture, blurred by scaling or by a block of a codec that lies across; they are cropped."""
LEAST = 0.25
"""A picture of less than this share of a side is none: then the whole is kept."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a picture, in pixels; `frames[:, box.rows, box.columns]` is what lies in it."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)

    def scaled(self, shape: tuple[int, int], onto: tuple[int, int]) -> Box:
        """The box of a picture of `shape` (height, width) on the same picture of `onto`: inside of it by up to a pixel."""
        (height, width), (tall, wide) = shape, onto
        top, bottom = -(-self.top * tall // height), (self.top + self.height) * tall // height
        left, right = -(-self.left * wide // width), (self.left + self.width) * wide // width
        return Box(top, left, bottom - top, right - left)


def picture(frames: np.ndarray, even: bool = True) -> Box:
    """The box within bars and borders of frames uint8 [T, H, W, 3] of one shot, the more spread over it the surer.

    The whole where there are none, where all is of one colour, and where less than a quarter of a side would be left. `even`:
    height and width are, as 4:2:0 wants them; a row or column more is then cropped.
    """
    low, high = frames.min(axis=0).astype(np.int16), frames.max(axis=0).astype(np.int16)
    height, width = low.shape[:2]
    top, bottom, left, right = 0, height, 0, width
    for _ in range(3):  # a bar may end at a pillar, which has to go first
        before = top, bottom, left, right
        top += _bar(low[top:bottom, left:right], high[top:bottom, left:right])
        bottom -= _bar(low[top:bottom, left:right][::-1], high[top:bottom, left:right][::-1])
        left += _bar(*(_columns_first(part[top:bottom, left:right]) for part in (low, high)))
        right -= _bar(*(_columns_first(part[top:bottom, left:right])[::-1] for part in (low, high)))
        if (top, bottom, left, right) == before:
            break
    box = Box(top, left, bottom - top, right - left)
    if box.height < LEAST * height or box.width < LEAST * width:
        box = Box(0, 0, height, width)
    return Box(box.top, box.left, box.height // 2 * 2, box.width // 2 * 2) if even else box


def _columns_first(part: np.ndarray) -> np.ndarray:
    return part.swapaxes(0, 1)


def _bar(low: np.ndarray, high: np.ndarray) -> int:
    """Rows [H, W, 3] from the first on that are a bar, and what is soft at its edge; 0 where there is none.

    `low` and `high` are the least and the greatest value of each pixel over all frames.
    """
    if len(low) < 2:
        return 0
    colour = np.median((low[0] + high[0]) / 2, axis=0)
    differs = np.maximum(np.abs(low - colour), np.abs(high - colour)).max(axis=-1) > LEVELS
    share = differs.mean(axis=1)
    plain = int(np.argmax(share > SPECKS)) if (share > SPECKS).any() else len(share)
    begun = share[plain : plain + SOFT + 1] >= EDGE
    return plain + int(np.argmax(begun)) if plain and begun.any() else 0
