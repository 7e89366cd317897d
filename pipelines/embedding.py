"""The embedding that a release's rules name, as a kind of signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from infra.errors import UserError
from models.multimodal import MultimodalRef, load_multimodal
from models.source import content_sha256, resolve
from pipelines.rules import EmbeddingRule
from pipelines.signatures import EmbeddingKind
from stages.judge import import_call


def embedding_kind(rule: EmbeddingRule) -> EmbeddingKind:
    """A model is loaded when the first clip is embedded. UserErrors name `embedding.model` or `embedding.call`."""
    try:
        if rule.call is not None:
            code = cast("Callable[[np.ndarray], np.ndarray]", import_call(rule.call))
            return EmbeddingKind(code, f"{rule.call}@{rule.version}", rule.num_frames)
        assert rule.model is not None
        path = resolve(rule.model, "judge", rule.revision)
        return EmbeddingKind(_by_model(path), f"vision tower {content_sha256(path)}", rule.num_frames)
    except UserError as error:
        raise UserError(_renamed(error)) from error


def _by_model(path: str) -> Callable[[np.ndarray], np.ndarray]:
    def embed(frames: np.ndarray) -> np.ndarray:
        # In one precision everywhere: what is in the cache does not say what it was computed on.
        try:
            return load_multimodal(MultimodalRef(path, dtype="float32")).embed(frames)
        except UserError as error:
            raise UserError(_renamed(error)) from error

    return embed


def _renamed(error: UserError) -> str:
    said = str(error)
    for key in ("judge.model, caption.model:", "judge.model:", "judge.call:"):
        said = said.replace(key, f"embedding.{'call' if 'call' in key else 'model'}:", 1)
    return said
