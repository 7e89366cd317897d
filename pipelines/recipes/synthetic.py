"""synthetic: prompts to judged and captioned media, with latents beside them where the spec asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.batch import Stage
from stages.decode import DecodeLatents
from stages.encode import EncodeText
from stages.group import InGroup
from stages.sample import SampleLatents

if TYPE_CHECKING:
    from pipelines.resolve import Resolved


def encoding(run: Resolved) -> EncodeText:
    layout = run.spec.layout
    kept = run.spec.output.tensors.get("text_embeddings", "")
    return EncodeText(run.generators, run.plan, layout.batch_size, layout.threads, keep_text=kept)


def generating(run: Resolved, hash_noise: bool = False) -> tuple[Stage, ...]:
    """Stages that use the generator."""
    layout = run.spec.layout
    arguments = (run.generators, run.plan, layout.batch_size, layout.threads)
    states = run.kept_states
    kept = states.places if states else ()
    sample = SampleLatents(*arguments, hash_noise=hash_noise, keep=kept, early=run.early)
    decode = DecodeLatents(*arguments)
    parallel = run.generators[0].parallel
    return (
        encoding(run),
        InGroup(sample, parallel.size) if parallel.size > 1 else sample,
        InGroup(decode, parallel.size) if parallel.vae > 1 else decode,
    )


def judging(run: Resolved) -> tuple[Stage, ...]:
    """Stages that see media: cheap scores reject before the judge is asked, and what it rejects is not captioned."""
    return (*run.scoring(), *run.captioning(), run.writing())
