"""How estimates are scored, as the spec says it: by which model, on which questions, or by code of one's own."""

from __future__ import annotations

import hashlib
import json

from infra.errors import UserError
from models.early import KEY
from models.multimodal import MultimodalRef
from models.viewer import ViewerRef
from pipelines.spec import Spec
from pipelines.viewer_refs import version_of
from stages.early import NAME, EarlyReject
from stages.rubric import Rubric


def early_reject(spec: Spec, rubric: Rubric, judge: ViewerRef | None, screen: ViewerRef | None) -> EarlyReject | None:
    """None where nothing is to be stopped. UserError where no model can score in the sampler's own actor."""
    asked = spec.sampler.early_reject
    if asked is None:
        return None
    known = [question.name for question in rubric.questions]
    if unknown := [name for name in asked.questions if name not in known]:
        raise UserError(
            f"{KEY}.questions: rubric {rubric.name} has no question {unknown[0]}; it has {', '.join(known)}"
        )
    tiers = ((spec.judge.screen, screen), (spec.judge, judge))
    section, model = next(((tier, ref) for tier, ref in tiers if tier and isinstance(ref, MultimodalRef)), (None, None))
    if NAME in (*known, *spec.judge.thresholds):
        raise UserError(f"{KEY}: its score is named {NAME}, and so is one of the judge; rename that")
    if asked.call is not None:
        model = None
    elif section is None or model is None:
        raise UserError(
            f"{KEY}: its scores are a model's that runs beside the sampler, found judge.backend: {spec.judge.backend}; give"
            f" judge.screen with backend transformers, or {KEY}.call"
        )
    only = asked.questions or (
        spec.judge.screen.questions if section is spec.judge.screen and spec.judge.screen else ()
    )
    questions = rubric.only(only)
    facts = spec.judge.decompose.score if spec.judge.decompose else "mean"
    num_frames = section.num_frames if section is not None else 8  # type: ignore[attr-defined]
    who = [asked.call, asked.version] if model is None or section is None else [version_of(section.model, model)]
    told = [*who, questions.sha256, num_frames, facts, section.token_drop if section else 0, asked.at, asked.frames]
    return EarlyReject(
        at=asked.at,
        frames=asked.frames,
        asked=hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12],
        rubric=questions,
        model=model,
        call=asked.call,
        facts=facts,
        num_frames=num_frames,
        hold_out=asked.hold_out,
    )
