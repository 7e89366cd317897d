"""How well a text fits a picture: the cosine of CLIP's embeddings of both (Radford et al. 2021).

Thresholds in use: 0.1 at least (data-juicer, image_text_similarity_filter and its video twin). Panda-70M's 0.43 is another
model's (UMT). Open-Sora takes the middle frame, and so does this.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from models.scorers.checkpoint import ScorerRef, load_model, load_processor, pixel_values

EXPECTED = "a CLIP of transformers with its tokenizer"


@cache
def load_clip(ref: ScorerRef) -> ClipMatch:
    """The CLIP of `ref`, loaded once for each process. Raises UserError where the folder holds none."""
    return ClipMatch(ref)


class ClipMatch:
    """A loaded CLIP. Embeddings are float32 and of length 1, so that a dot product is the cosine."""

    def __init__(self, ref: ScorerRef) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.model = load_model(ref, CLIPModel, EXPECTED)
        self.processor = load_processor(ref, AutoImageProcessor, EXPECTED)
        self.tokenizer = load_processor(ref, AutoTokenizer, EXPECTED)

    def match(self, frames: np.ndarray, texts: list[str]) -> np.ndarray:
        """float32 [n], -1 to 1: the cosine of each clip's middle frame, of uint8 [n, T, H, W, 3], and its text."""
        return np.asarray(np.einsum("nd,nd->n", self.images(frames), self.texts(texts)), np.float32)

    def images(self, frames: np.ndarray) -> np.ndarray:
        """Embeddings float32 [n, d] of the middle frames of clips uint8 [n, T, H, W, 3]."""
        import torch

        with torch.inference_mode():
            middle = pixel_values(self.processor, frames[:, frames.shape[1] // 2], self.model)
            seen = self.model.vision_model(pixel_values=middle).pooler_output
            return _unit(self.model.visual_projection(seen))

    def texts(self, texts: list[str]) -> np.ndarray:
        """Embeddings float32 [n, d]; a text is cut off after as many tokens as CLIP reads, 77."""
        import torch

        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        with torch.inference_mode():
            said = self.model.text_model(
                input_ids=tokens["input_ids"].to(self.model.device),
                attention_mask=tokens["attention_mask"].to(self.model.device),
            ).pooler_output
            return _unit(self.model.text_projection(said))


def _unit(embeds: Any) -> np.ndarray:
    import torch

    return np.asarray(torch.nn.functional.normalize(embeds.float(), dim=-1).cpu().numpy(), np.float32)
