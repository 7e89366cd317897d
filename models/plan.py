"""The sampler plan: what is meant to change the result, and its identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class SamplerPlan:
    """How latents are made from noise. `accelerate` holds one JSON object a technique, in order."""

    scheduler: str = "default"
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    shift: float | None = None
    max_sequence_length: int = 512
    dtype: str = "auto"  # the denoiser's; auto follows the device
    accelerate: tuple[str, ...] = ()
    blocks: tuple[int, int] | None = None
    """Latent frames of a block and of its context, where DualParal samples the video."""
    scenes: tuple[str, float] | None = None
    """What stands between the scenes of a prompt, and over how many blocks one gives way to the next."""
    sigmas: tuple[float, ...] | None = None
    """Noise level of each step of a flow, descending, as the denoiser meets it: no shift is applied any more."""
    solver_order: int | None = None
    """Of a multistep solver; None for the checkpoint's own."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplerPlan:
        """A plan from what `to_json` says. TypeError for keys that it does not know."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**known)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, the same text for the same plan."""
        values = asdict(self)
        values["guidance_scale"] = float(self.guidance_scale)
        for name in ("blocks", "scenes", "sigmas", "solver_order"):
            if values[name] is None:
                del values[name]  # plans without it keep the identity they had before there was one
        values["shift"] = None if self.shift is None else float(self.shift)
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    def shortened(self, steps: int) -> SamplerPlan:
        """At most the first so many steps, to try what a plan costs. Of `sigmas` it takes the first ones, then 0."""
        steps = min(steps, self.num_inference_steps)
        return replace(self, num_inference_steps=steps, sigmas=None if self.sigmas is None else self.sigmas[:steps])

    @cached_property
    def plan_id(self) -> str:
        """32 hex digits of the plan's content."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()
