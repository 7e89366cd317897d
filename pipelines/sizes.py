"""How many bytes a run will take, by kind, before it is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from pipelines.kept import kept_states
from pipelines.spec import Bucket, Spec

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}

GEOMETRY = {"Wan-AI/Wan2.1-": (16, 4, 8), "Wan-AI/Wan2.2-T2V-": (16, 4, 8), "Wan-AI/Wan2.2-I2V-": (16, 4, 8)}
"""Of models that are often planned for elsewhere, by the beginning of their name: channels of a latent, frames to a latent
frame, pixels to a side of a latent pixel."""

Shape = tuple[int, ...]


def sample_bytes(spec: Spec, latent_shape: Shape) -> dict[str, int]:
    """Bytes of the tensors of one accepted sample by kind: latents, noise, trajectory. Headers are not counted."""
    values = math.prod(latent_shape)
    tensors = {str(kind): dtype for kind, dtype in spec.output.tensors.items() if kind != "text_embeddings"}
    kept = {kind: values * WIDTH[dtype] for kind, dtype in tensors.items()}
    states = kept_states(spec)
    if states is not None:
        kept["trajectory"] = len(states.places) * values * WIDTH[states.dtype]
    return kept


def planned_bytes(
    spec: Spec, samples: int, shape_of: Callable[[Bucket], Shape | None], measured: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Bytes of `samples` samples by kind, if all are accepted; empty where nothing is known.

    `measured` are those of one sample that only a trial tells: media, and text of each distinct prompt.
    """
    total: dict[str, float] = {}
    weight = sum(bucket.weight for bucket in spec.buckets)
    for bucket in spec.buckets:
        shape = shape_of(bucket)
        for kind, nbytes in sample_bytes(spec, shape).items() if shape is not None else ():
            total[kind] = total.get(kind, 0.0) + nbytes * samples * bucket.weight / weight
    for kind, each in (measured or {}).items():
        count = samples / (spec.samples_per_prompt * len(spec.generators)) if kind == "text" else samples
        if each:
            total[kind] = each * count
    return total


def known_shape(spec: Spec, bucket: Bucket) -> Shape | None:
    """The latent shape of a bucket by the name of the model, which need not be here; None where it says nothing."""
    model = spec.generators[0].model
    found = next((known for name, known in GEOMETRY.items() if model.startswith(name)), None)
    if found is None:
        return None
    channels, temporal, spatial = found
    return (channels, (bucket.num_frames - 1) // temporal + 1, bucket.height // spatial, bucket.width // spatial)


def in_words(nbytes: Mapping[str, float]) -> str:
    """A line for a person."""
    parts = ", ".join(f"{kind} {shown(value)}" for kind, value in nbytes.items())
    return f"bytes, if all are accepted: {shown(sum(nbytes.values()))} ({parts})"


def shown(nbytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"
