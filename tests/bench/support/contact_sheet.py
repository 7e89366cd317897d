"""A picture of many clips for a person to look at: each clip a strip of its frames, with its prompt underneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EDGE = 6
LINE = 12


def contact_sheet(
    clips: np.ndarray, prompts: Sequence[str], *, columns: int = 4, frames: int = 5, zoom: int = 1
) -> Image.Image:
    """Strips of `frames` frames, evenly apart, of uint8 clips [n, T, H, W, 3], with their prompts."""
    height, width = clips.shape[2] * zoom, clips.shape[3] * zoom
    strip = frames * (width + 1) - 1
    letters = max(20, strip // 6)
    wrapped = [textwrap.wrap(prompt, letters) for prompt in prompts]
    cell = (strip + EDGE, height + LINE * max(map(len, wrapped)) + EDGE)
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + EDGE, rows * cell[1] + EDGE), (70, 70, 76))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    pen.fontmode = "1"  # letters without grey edges: most of the file would be letters
    shown = np.linspace(0, clips.shape[1] - 1, frames).round().astype(int)
    for at, (clip, lines) in enumerate(zip(clips, wrapped, strict=True)):
        left, top = EDGE + (at % columns) * cell[0], EDGE + (at // columns) * cell[1]
        for number, frame in enumerate(clip[shown]):
            image = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left + number * (width + 1), top))
        for number, line in enumerate(lines):
            pen.text((left, top + height + 1 + number * LINE), line, fill=(235, 235, 235), font=font)
    return sheet
