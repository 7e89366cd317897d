"""Optical flow by Perceiver IO (Jaegle et al. 2021, section 4.2; deepmind/optical-flow-perceiver).

It is the one flow network that transformers has. RAFT, which data-juicer uses, is in torchvision, which ditmill does without:
`call:` is the way to it. data-juicer bounds the mean length of flow, at 2 frames a second: 0.25 (Farneback), 1.0 (RAFT).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from models.scorers.checkpoint import ScorerRef, load_model

EXPECTED = "a PerceiverForOpticalFlow of transformers"

SCALE = 20.0
"""The network was trained on flow divided by this (deepmind-research, issue 266)."""


@cache
def load_flow(ref: ScorerRef) -> Flow:
    """The network of `ref`, loaded once for each process. Raises UserError where the folder holds none."""
    return Flow(ref)


class Flow:
    """A loaded network. It reads frames of one size, `train_size` (368 x 496), to which others are scaled."""

    def __init__(self, ref: ScorerRef) -> None:
        from transformers import PerceiverForOpticalFlow

        self.model = load_model(ref, PerceiverForOpticalFlow, EXPECTED)
        self.size = tuple(int(side) for side in self.model.config.train_size)

    def motion(self, frames: np.ndarray, pairs: int = 4) -> np.ndarray:
        """float32 [n]: mean length of flow over pixels and `pairs` of neighbouring frames spread over each clip, in pixels
        of the frame per frame; 0 for images. `frames` is uint8 [n, T, H, W, 3]."""
        total = frames.shape[1]
        if total < 2:
            return np.zeros(len(frames), np.float32)
        starts = sorted(set(np.linspace(0, total - 2, min(pairs, total - 1)).round().astype(int)))
        lengths = [
            [np.linalg.norm(self.flow(clip[at], clip[at + 1]), axis=-1).mean() for at in starts] for clip in frames
        ]
        return np.asarray(lengths, np.float32).mean(axis=1)

    def flow(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Flow float32 [h, w, 2] (across, down), of the network's size and in pixels of the frames uint8 [H, W, 3]."""
        import cv2
        import torch

        height, width = self.size
        scaled = [
            cv2.resize(np.ascontiguousarray(frame), (width, height), interpolation=cv2.INTER_LINEAR)
            for frame in (before, after)
        ]
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).float() / 255 * 2 - 1
            patches = _neighbourhoods(pixels)[None].to(self.model.device, self.model.dtype)
            found = self.model(inputs=patches).logits[0].float() * SCALE
        return np.asarray(
            found.cpu().numpy() * np.array([before.shape[1] / width, before.shape[0] / height]), np.float32
        )


def _neighbourhoods(pixels: Any) -> Any:
    """Each pixel with those around it, zero beyond the edge: [2, 3, H, W] to [2, 27, H, W], places before channels."""
    import torch

    frames, channels, height, width = pixels.shape
    unfolded = torch.nn.functional.unfold(pixels, kernel_size=3, padding=1)
    return (
        unfolded.view(frames, channels, 9, height, width).transpose(1, 2).reshape(frames, 9 * channels, height, width)
    )
