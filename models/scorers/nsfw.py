"""How likely a clip is not safe for work, by an image classifier such as Falconsai/nsfw_image_detection (a ViT, 2 classes).

Threshold in use: 0.5 at most (data-juicer, image_nsfw_filter and video_nsfw_filter).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from infra.errors import UserError
from models.scorers.checkpoint import ScorerRef, first_middle_last, load_model, load_processor, pixel_values

EXPECTED = "an image classifier of transformers that has a class called nsfw"


@cache
def load_nsfw(ref: ScorerRef) -> Nsfw:
    """The classifier of `ref`, loaded once for each process. Raises UserError where the folder holds none."""
    return Nsfw(ref)


class Nsfw:
    """A loaded classifier."""

    def __init__(self, ref: ScorerRef) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.model = load_model(ref, AutoModelForImageClassification, EXPECTED)
        self.processor = load_processor(ref, AutoImageProcessor, EXPECTED)
        names = {str(name).lower(): int(number) for number, name in self.model.config.id2label.items()}
        if "nsfw" not in names:
            raise UserError(f"{ref.key}: {ref.path} has the classes {', '.join(names)}; give a folder with {EXPECTED}")
        self._nsfw = names["nsfw"]

    def score(self, frames: np.ndarray) -> np.ndarray:
        """float32 [n], 0 to 1: the greatest probability among the first, middle and last frame of uint8 [n, T, H, W, 3]."""
        import torch

        shown = first_middle_last(frames)
        flat = shown.reshape(-1, *shown.shape[2:])
        with torch.inference_mode():
            logits = self.model(pixel_values=pixel_values(self.processor, flat, self.model)).logits.float()
        likely = torch.softmax(logits, dim=-1)[:, self._nsfw].reshape(shown.shape[:2])
        return np.asarray(likely.amax(dim=1).cpu().numpy(), np.float32)
