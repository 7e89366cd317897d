"""curate: clips of media that exist to judged and captioned ones. Nothing is generated.

The order is the field's: cheap scores, then the judge, then captions of what is left (Open-Sora 1.2's data pipeline, Stable
Video Diffusion, arXiv:2311.15127). A source's caption is held against the clip before it is taken over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.batch import Stage
from stages.keep import KeepClips
from stages.look import LookAtClips
from stages.take_captions import TakeCaptions
from stages.texture import ScoreTexture

if TYPE_CHECKING:
    from pipelines.resolve import Resolved


def generating(run: Resolved) -> tuple[Stage, ...]:
    """The stage that reads what is looked at."""
    clip = run.spec.clip
    return (LookAtClips(run.storage, clip.look_fps, clip.look_side, run.spec.cut.max_bytes),)


def judging(run: Resolved) -> tuple[Stage, ...]:
    """Stages that see media, and at the end the one that cuts accepted clips out."""
    spec = run.spec
    take = TakeCaptions(
        model=run.judge or run.captioner,
        oracle=spec.judge.backend == "oracle",
        least=spec.clip.caption_match,
        num_frames=spec.judge.num_frames,
        threads=spec.layout.threads,
    )
    as_is = spec.clip.fps is None and spec.clip.max_side is None
    keep = KeepClips(run.storage, spec.output.image_format, spec.output.crf, spec.cut.max_bytes, as_is)
    score, *judge = run.scoring()
    texture = ScoreTexture(**spec.texture.model_dump())
    return (score, texture, *judge, *run.captioning(), take, keep, run.writing())
