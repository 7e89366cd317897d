"""The sampler plan: what is meant to change the result, and its identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
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
        for name in ("blocks", "scenes"):
            if values[name] is None:
                del values[name]  # plans without it keep the identity they had before there was one
        values["shift"] = None if self.shift is None else float(self.shift)
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @cached_property
    def plan_id(self) -> str:
        """32 hex digits of the plan's content."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()
