"""The sampler plan: what is meant to change the result, and its identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property


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

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, the same text for the same plan."""
        values = asdict(self)
        values["guidance_scale"] = float(self.guidance_scale)
        values["shift"] = None if self.shift is None else float(self.shift)
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @cached_property
    def plan_id(self) -> str:
        """32 hex digits of the plan's content."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()
