"""CaptionMedia: what an accepted sample shows, in words, in several styles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.multimodal import evenly_spaced
from models.viewer import ViewerRef, load_viewer, name_of
from stages.batch import Batch, jsons, texts

INSTRUCTIONS = {
    "short": "Describe this {media} in one sentence.",
    "dense": (
        "Describe this {media} in full detail: every object, its colours, shape, size and position, how it moves, "
        "the background, the light and the camera."
    ),
}
"""What the model is asked for each style."""


@dataclass(frozen=True)
class CaptionMedia:
    """Captions what was accepted. Reads `frames`; adds `captions` and `caption`, the text of the first style."""

    model: ViewerRef
    styles: tuple[str, ...] = ("short", "dense")
    max_new_tokens: int = 96
    num_frames: int = 8
    threads: int = 1
    label: str = ""  # the model as the spec names it, recorded with each caption

    name: ClassVar[str] = "caption"
    reads: ClassVar[tuple[str, ...]] = ("frames",)
    adds: ClassVar[tuple[str, ...]] = ("captions", "caption")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        load_viewer(self.model, self.threads)

    def __call__(self, batch: Batch) -> Batch:
        media = "video" if batch["frames"].shape[1] > 1 else "image"
        instructions = [INSTRUCTIONS[style].format(media=media) for style in self.styles]
        frames = evenly_spaced(batch["frames"], self.num_frames)
        answers = load_viewer(self.model).caption(frames, instructions, self.max_new_tokens)
        label = self.label or name_of(self.model)
        captions = [
            [
                {"style": style, "language": "en", "scene": 0, "text": text, "model": label}
                for style, text in zip(self.styles, answer, strict=True)
            ]
            for answer in answers
        ]
        return batch | {
            "captions": jsons(captions),
            "caption": texts([answer[0] if answer else "" for answer in answers]),
        }
