"""What a row of recipe curate says in the place of a generator: how its clip is cut out of its source."""

from __future__ import annotations

import hashlib
import json

from pipelines.spec import Spec
from stages.write import GeneratorFacts

CLIPS = "clips"
"""In the place of a generator's id: a clip has no generator."""
VERSION = 1
"""Of how clips are cut out: another one makes all of them anew."""


def clip_facts(spec: Spec) -> GeneratorFacts:
    """No model, no steps, and a plan of what is kept of a clip."""
    said = {"crop": spec.clip.crop, "fps": spec.clip.fps, "max_side": spec.clip.max_side, "version": VERSION}
    plan_json = json.dumps({"clip": said}, sort_keys=True, separators=(",", ":"))
    plan_id = hashlib.blake2b(plan_json.encode(), digest_size=16).hexdigest()
    return GeneratorFacts("", "", plan_id, plan_json, num_inference_steps=0, guidance_scale=0.0)
