"""The LAION aesthetic predictor V2: a head on CLIP ViT-L/14 that was fitted to ratings from 1 to 10 (Schuhmann 2022).

The head is linear layers one after the other, without activations, on the normalised image embedding. Thresholds in use:
4.5 (Open-Sora on Panda-70M), 5.0 (Open-Sora's example), 5.5 (fair, Open-Sora), 6.5 (high, Open-Sora).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import UserError
from models.scorers.checkpoint import ScorerRef, attempt, first_middle_last, load_model, load_processor, pixel_values

EXPECTED = "a CLIP of transformers and its head's layers.N.weight and layers.N.bias, in its own file or one beside it"

_HEAD = re.compile(r"layers\.(\d+)\.(weight|bias)")


@cache
def load_aesthetic(ref: ScorerRef) -> Aesthetic:
    """The predictor of `ref`, loaded once for each process. Raises UserError where the folder holds none."""
    return Aesthetic(ref)


class Aesthetic:
    """A loaded predictor."""

    def __init__(self, ref: ScorerRef) -> None:
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection, PretrainedConfig

        # The vision tower's own config has the width of the embedding too, and it may be another.
        width = attempt(ref, EXPECTED, lambda: PretrainedConfig.get_config_dict(ref.path)[0]["projection_dim"])
        self.model = load_model(ref, CLIPVisionModelWithProjection, EXPECTED, projection_dim=width)
        self.processor = load_processor(ref, AutoImageProcessor, EXPECTED)
        self.head = _head(ref, self.model)

    def score(self, frames: np.ndarray) -> np.ndarray:
        """float32 [n]: about 1 to 10, the mean over the first, middle and last frame of clips uint8 [n, T, H, W, 3]."""
        import torch

        shown = first_middle_last(frames)
        flat = shown.reshape(-1, *shown.shape[2:])
        with torch.inference_mode():
            embeds = self.model(pixel_values=pixel_values(self.processor, flat, self.model)).image_embeds.float()
            rated = self.head(torch.nn.functional.normalize(embeds, dim=-1))
        return np.asarray(rated.reshape(shown.shape[:2]).mean(dim=1).cpu().numpy(), np.float32)


def _head(ref: ScorerRef, model: Any) -> Any:
    """The linear layers, in float32, in the order of their numbers."""
    import torch
    from safetensors import safe_open

    def read() -> dict[tuple[int, str], torch.Tensor]:
        found = {}
        for file in sorted(Path(ref.path).glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                for name in list(weights.keys()):
                    if match := _HEAD.fullmatch(name):
                        found[int(match[1]), match[2]] = weights.get_tensor(name).float()
        return found

    found = attempt(ref, EXPECTED, read)
    layers, width = [], model.config.projection_dim
    for number in sorted({number for number, _ in found}):
        weight, bias = found.get((number, "weight")), found.get((number, "bias"))
        if weight is None or bias is None or weight.shape != (len(bias), width):
            shape = None if weight is None else list(weight.shape)
            raise UserError(
                f"{ref.key}: {ref.path}: layers.{number} of the head is {shape}, expected [*, {width}] and a bias"
            )
        layer = torch.nn.Linear(width, len(bias))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        width = len(bias)
    if not layers or width != 1:
        raise UserError(f"{ref.key}: {ref.path} has no head that ends in one number; give a folder with {EXPECTED}")
    return torch.nn.Sequential(*layers).to(model.device).eval()
