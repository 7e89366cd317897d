"""What expands prompts, and what its texts depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from models.language import LanguageRef
from models.source import content_sha256, resolve
from pipelines.spec import Spec
from stages.expand import ExpandPrompts


@dataclass(frozen=True)
class Expander:
    """The language model that expands prompts. Its fingerprint holds all that makes its text what it is."""

    stage: ExpandPrompts
    fingerprint: str


def expander_of(spec: Spec) -> Expander | None:
    """What expands the prompts of a spec; None where nothing does."""
    expand = spec.prompts.expand
    if expand is None:
        return None
    folder = resolve(expand.model, "expander", expand.revision)
    stage = ExpandPrompts(
        model=LanguageRef(folder),
        instruction=expand.instruction,
        variants=expand.variants,
        temperature=expand.temperature,
        max_new_tokens=expand.max_new_tokens,
        seed=spec.seed,
        threads=spec.layout.threads,
    )
    # The number of variants is no part of it: more of them keep the first ones.
    settings = {key: value for key, value in asdict(stage).items() if key not in ("model", "threads", "variants")}
    text = json.dumps({**settings, "model": content_sha256(folder)}, sort_keys=True)
    return Expander(stage, hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
