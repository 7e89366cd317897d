"""The embedding that a release's rules name, as a kind of signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from models.multimodal import MultimodalRef, load_multimodal
from models.source import content_sha256, resolve
from pipelines.rules import EmbeddingRule
from pipelines.signatures import EmbeddingKind
from stages.judge import import_call


def embedding_kind(rule: EmbeddingRule) -> EmbeddingKind:
    """A model is loaded when the first clip is embedded. UserErrors name `embedding.model` or `embedding.call`."""
    if rule.call is not None:
        code = cast("Callable[[np.ndarray], np.ndarray]", import_call(rule.call, "embedding.call"))
        return EmbeddingKind(code, f"{rule.call}@{rule.version}", rule.num_frames)
    assert rule.model is not None
    path = resolve(rule.model, "judge", rule.revision, key="embedding.model")
    return EmbeddingKind(_by_model(path), f"vision tower {content_sha256(path)}", rule.num_frames)


def _by_model(path: str) -> Callable[[np.ndarray], np.ndarray]:
    # In one precision everywhere: what is in the cache does not say what it was computed on.
    ref = MultimodalRef(path, dtype="float32", section="embedding")
    return lambda frames: load_multimodal(ref).embed(frames)
