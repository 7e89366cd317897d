"""Where there is text, by a PP-OCRv5 detector: differentiable binarization (Liao et al. 2020), as Open-Sora's DBNet++ is.

They are transformers' detectors of words in scenes. Their image processor needs torchvision, so what it does before and after
the network is done here. Detection only: nothing is read. Open-Sora counts boxes above 0.3; data-juicer's filters bound the
share of the picture that boxes cover.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from models.scorers.checkpoint import ScorerRef, load_model

EXPECTED = "a text detector of transformers (PP-OCRv5 or PP-OCRv6, det)"

INKED = 0.3
"""Probability from which on a pixel is text."""
BOX = 0.6
"""Mean probability of a box, at least."""
UNCLIP = 1.5
"""Text is marked narrower than it is: boxes grow by this times area over perimeter (Liao et al. 2020, equation 10)."""
SIDE = 960
"""Frames are scaled down to this longer side; both sides become multiples of 32."""
MEAN, DEVIATION = (0.406, 0.456, 0.485), (0.225, 0.224, 0.229)
"""ImageNet's, in the order blue, green, red, which PaddleOCR gives to channels red, green, blue; then they are reversed."""


class Box(NamedTuple):
    """Pixels of the frame, and the mean probability in what was marked."""

    left: int
    top: int
    right: int
    bottom: int
    probability: float


@cache
def load_text_boxes(ref: ScorerRef) -> TextBoxes:
    """The detector of `ref`, loaded once for each process. Raises UserError where the folder holds none."""
    return TextBoxes(ref)


class TextBoxes:
    """A loaded detector."""

    def __init__(self, ref: ScorerRef) -> None:
        from transformers import AutoModelForObjectDetection

        self.model = load_model(ref, AutoModelForObjectDetection, EXPECTED)

    def area(self, frames: np.ndarray) -> np.ndarray:
        """float32 [n], 0 to 1: the share of each clip's middle frame, of uint8 [n, T, H, W, 3], that boxes of text cover."""
        areas = []
        for clip in frames:
            covered = np.zeros(clip.shape[1:3], bool)
            for box in self.boxes(clip[len(clip) // 2]):
                covered[box.top : box.bottom, box.left : box.right] = True
            areas.append(covered.mean())
        return np.asarray(areas, np.float32)

    def boxes(self, frame: np.ndarray) -> list[Box]:
        """Upright boxes of text in a frame uint8 [H, W, 3]."""
        return boxes_of(self.probabilities(frame), frame.shape[:2])

    def probabilities(self, frame: np.ndarray) -> np.ndarray:
        """How likely each pixel of the scaled frame is text: float32 [h, w]."""
        import cv2
        import torch

        height, width = frame.shape[:2]
        scale = min(1.0, SIDE / max(height, width))
        tall, wide = (max(32, round(side * scale / 32) * 32) for side in (height, width))
        scaled = cv2.resize(np.ascontiguousarray(frame), (wide, tall), interpolation=cv2.INTER_LINEAR).astype(
            np.float32
        )
        inputs = ((scaled / 255 - MEAN) / DEVIATION)[..., ::-1].astype(np.float32).transpose(2, 0, 1)[None]
        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(inputs)).to(self.model.device, self.model.dtype)
            found = self.model(pixel_values=pixels).last_hidden_state
        return np.asarray(found[0, 0].float().cpu().numpy(), np.float32)


def boxes_of(probabilities: np.ndarray, shape: tuple[int, ...]) -> list[Box]:
    """The boxes in a map float32 [h, w], on a frame of `shape` (height, width)."""
    import cv2

    marked = (probabilities > INKED).astype(np.uint8)
    count, labels, regions, _ = cv2.connectedComponentsWithStats(marked, connectivity=8)
    down, across = shape[0] / marked.shape[0], shape[1] / marked.shape[1]
    found = []
    for region in range(1, count):
        left, top, wide, tall, _ = regions[region].tolist()
        part = probabilities[top : top + tall, left : left + wide][
            labels[top : top + tall, left : left + wide] == region
        ]
        if min(wide, tall) < 3 or part.mean() < BOX:
            continue
        grown = UNCLIP * wide * tall / (2 * (wide + tall))
        found.append(
            Box(
                max(0, math.floor((left - grown) * across)),
                max(0, math.floor((top - grown) * down)),
                min(shape[1], math.ceil((left + wide + grown) * across)),
                min(shape[0], math.ceil((top + tall + grown) * down)),
                float(part.mean()),
            )
        )
    return found
