"""KeepClips: the bytes that are kept of an accepted clip."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from infra.storage import Storage
from stages.batch import Batch, SampleError, load_json, size, texts
from stages.clip import remux
from stages.look import CUT_FROM, clip_frames, opened_clip
from stages.probe import Limits, probe

if TYPE_CHECKING:
    from infra.media import Encoded


@dataclass(frozen=True)
class KeepClips:
    """Reads `inputs`, `extra`, `height`, `width`, `num_frames` and `fps`; adds `encoded`, an infra.media.Encoded of each
    clip that was accepted.

    With `as_is` a clip of which nothing is cropped, turned or scaled, and that begins at a keyframe, is cut out of its source
    without re-encoding; `num_frames` and `fps` then become those of its packets. All others are decoded and encoded, in the
    shape that the row says.

    Fails a clip as LookAtClips does, and with `bad_media` where it cannot be encoded.
    """

    storage: Storage
    image_format: Literal["webp", "png"]
    crf: int
    max_bytes: int
    as_is: bool = True

    name: ClassVar[str] = "keep"
    reads: ClassVar[tuple[str, ...]] = ("inputs", "extra", "height", "width", "num_frames", "fps")
    adds: ClassVar[tuple[str, ...]] = ("encoded", "num_frames", "fps")
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        import av  # noqa: F401

    def __call__(self, batch: Batch) -> Batch:
        count = size(batch)
        encoded = np.empty(count, object)
        frames, fps = batch["num_frames"].copy(), batch["fps"].copy()
        kinds, errors = [""] * count, [""] * count
        shape = int(batch["height"][0]), int(batch["width"][0])
        for at, (inputs, extra) in enumerate(zip(load_json(batch["inputs"]), load_json(batch["extra"]), strict=True)):
            try:
                encoded[at], frames[at], fps[at] = self._kept(inputs[0], extra, shape, int(frames[at]), float(fps[at]))
            except SampleError as fault:
                kinds[at], errors[at] = fault.error_type, f"{inputs[0]['uri']}: {fault}"
        kept = {"encoded": encoded, "num_frames": frames, "fps": fps}
        return {**batch, **kept, "error_type": texts(kinds), "error": texts(errors)}

    def _kept(
        self, clip: dict[str, Any], extra: dict[str, Any], shape: tuple[int, int], count: int, fps: float
    ) -> tuple[Encoded, int, float]:
        from infra.media import Encoded, encode

        source = extra[CUT_FROM]
        own = (source["height"], source["width"]) == shape and not source["turned"]
        with opened_clip(clip, extra, self.storage, self.max_bytes) as file:
            cut = remux(file, clip["start"], clip["end"]) if self.as_is and own and clip["end"] else None
            if cut is not None:
                found = probe(io.BytesIO(cut.data), Limits())
                made = Encoded(
                    cut.data, "mp4", "video/mp4", f"{cut.codec} as it was, {cut.start:.3f} to {cut.end:.3f} s"
                )
                return made, found.frames, float(Fraction(found.fps))
            frames = clip_frames(file, clip, extra, count, shape)
        try:
            return encode(frames, fps, self.image_format, self.crf, marked=False), count, fps
        except ValueError as error:
            raise SampleError("bad_media", str(error)) from error
