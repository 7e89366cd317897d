"""What splits prompts into facts for the judge, looked up from a spec."""

from __future__ import annotations

import hashlib
import json

from models import facts
from models.language import LanguageRef
from models.source import content_sha256, resolve
from pipelines.spec import Spec
from stages.decompose import DecomposePrompts


def decomposer_of(spec: Spec) -> DecomposePrompts | None:
    """What splits prompts into facts. Its fingerprint holds all that makes them what they are."""
    decompose = spec.judge.decompose
    if decompose is None:
        return None
    model, instruction = None, decompose.instruction or facts.INSTRUCTION
    made_by: list[object] = [decompose.call, decompose.version]
    if decompose.model is not None:
        path = resolve(decompose.model, "decomposer", decompose.revision)
        model = LanguageRef(path, key="judge.decompose.model")
        made_by = [content_sha256(path), instruction, decompose.max_new_tokens]
    text = json.dumps([facts.VERSION, made_by, decompose.max_questions])
    return DecomposePrompts(
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        model=model,
        call=decompose.call,
        instruction=instruction,
        max_questions=decompose.max_questions,
        max_new_tokens=decompose.max_new_tokens,
        threads=spec.layout.threads,
    )
