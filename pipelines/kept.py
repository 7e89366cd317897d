"""What each recipe keeps, as the spec may ask for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.path import places_of
from pipelines.curation import defaults
from stages.tensors import KeptStates
from stages.write import TOLD

if TYPE_CHECKING:
    from pipelines.spec import Spec

TENSORS: dict[str, dict[str, str]] = {
    "reflow": {"latents": "float16", "text_embeddings": "float16"},
    "trajectory": {"text_embeddings": "float16"},
    "prompts": {"text_embeddings": "float16"},
}
"""Recipe -> what `output.tensors` is where the spec leaves it out."""


def with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a spec, with its recipe's tensors where it names none, and no judge where there is nothing to see."""
    if data.get("recipe") == "curate":
        return defaults(data)
    if data.get("recipe") == "prompts":
        data = {"judge": {"backend": "none"}, "caption": None, **data}
    output, wanted = data.get("output", {}), TENSORS.get(str(data.get("recipe")))
    if wanted is None or not isinstance(output, dict) or "tensors" in output:
        return data
    return {**data, "output": {**output, "tensors": dict(wanted)}}


def kept_states(spec: Spec) -> KeptStates | None:
    """Which states of a path are kept; None where the recipe keeps none. ValueError where they are not there."""
    asked = spec.trajectory
    if asked is None:
        return None
    places = places_of(asked.keep, asked.convention, spec.sampler.num_inference_steps)
    return KeptStates(asked.keep, asked.convention, places, asked.dtype)


def told(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `extra_json` of a row holds by the names of `TOLD`, without a user's own columns of these names.

    Datasets that keep no texts hold such columns as they came; there a text's id is known by its form alone.
    """
    said: dict[str, Any] = json.loads(row["extra_json"] or "{}")
    if row["recipe"] == "synthetic":
        return {name: value for name in ("text_id", "negative_text_id") if _is_id(value := said.get(name))}
    return {name: said[name] for name in TOLD if name in said}


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def check_recipe(spec: Spec) -> None:
    """ValueError, which names the key, where a spec asks of its recipe what it does not do."""
    tensors = spec.output.tensors
    if spec.trajectory is not None and spec.recipe != "trajectory":
        raise ValueError(f"trajectory: recipe {spec.recipe} keeps no states; set recipe: trajectory, or remove it")
    if spec.recipe == "trajectory":
        if spec.trajectory is None:
            raise ValueError(
                "trajectory: recipe trajectory needs it; say which states, such as {keep: [0, 12, 24, 36, -1]}"
            )
        if spec.sampler.dualparal is not None:
            raise ValueError("sampler.dualparal: blocks take no path that a state could be kept of; remove it")
        try:
            kept_states(spec)
        except ValueError as error:
            raise ValueError(f"trajectory.keep: {error}") from None
    if "text_embeddings" in tensors and spec.sampler.dualparal is not None and spec.sampler.dualparal.scenes:
        raise ValueError("output.tensors.text_embeddings: a prompt of several scenes has no one text; remove it")
    if spec.recipe == "reflow" and "latents" not in tensors:
        raise ValueError("output.tensors: recipe reflow is noise and final latents; add latents, or leave the key out")
    if spec.recipe == "prompts":
        if list(tensors) != ["text_embeddings"]:
            raise ValueError(
                f"output.tensors: recipe prompts keeps text_embeddings and nothing else, found {', '.join(tensors) or 'none'}"
            )
        for key, looks in (("judge", spec.judge.backend != "none"), ("caption", spec.caption is not None)):
            if looks:
                raise ValueError(f"{key}: recipe prompts makes no media to look at; remove it")
        if spec.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt: recipe prompts makes one row of a prompt, found {spec.samples_per_prompt}; remove it"
            )
