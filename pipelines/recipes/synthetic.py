"""synthetic: prompts to judged and captioned media, with latents beside them where the spec asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.batch import Stage
from stages.decode import DecodeLatents
from stages.encode import EncodeText
from stages.group import SampleInGroup
from stages.sample import SampleLatents

if TYPE_CHECKING:
    from pipelines.resolve import Resolved


def generating(run: Resolved) -> tuple[Stage, ...]:
    """Stages that use the generator."""
    layout = run.spec.layout
    sample = SampleLatents(run.generators, run.plan, layout.batch_size, layout.threads)
    ranks = run.generators[0].parallel.size
    return (
        EncodeText(run.generators, run.plan, layout.batch_size, layout.threads),
        SampleInGroup(sample, ranks) if ranks > 1 else sample,
        DecodeLatents(run.generators, run.plan, layout.batch_size, layout.threads),
    )


def judging(run: Resolved) -> tuple[Stage, ...]:
    """Stages that see media: cheap scores reject before the judge is asked, and what it rejects is not captioned."""
    return (*run.scoring(), *run.captioning(), run.writing())
