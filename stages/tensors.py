"""The tensors of a sample as members of a shard: its final latent, its noise, chosen states of its path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from infra.errors import UserError
from infra.shard import compressed, safetensors_bytes
from models.noise import standard_normal
from models.path import Convention
from stages.batch import SampleError

Row = dict[str, Any]
Member = tuple[str, bytes]
Compression = Literal["none", "zstd"]


@dataclass(frozen=True)
class KeptStates:
    """Which states of a path are kept, and how. `keep` is what the user asked for, in the user's own convention."""

    keep: str | tuple[int, ...]
    convention: Convention
    places: tuple[int, ...]
    dtype: str

    def facts(self, plan: Mapping[str, Any], steps: int) -> Row:
        """What a row says of them: places, and of each place its timestep and, of a flow, its sigma.

        `plan` is what Generator.describe says. At the final latent the timestep is 0.
        """
        timesteps = [_at(plan.get("timesteps") or (), place) for place in self.places]
        flow = "sigmas" in plan and plan.get("flow")
        return {
            "keep": self.keep if isinstance(self.keep, str) else list(self.keep),
            "convention": self.convention,
            "places": list(self.places),
            "timesteps": timesteps,
            "sigmas": [_at(plan["sigmas"], place) for place in self.places] if flow else [],
            "steps": steps,
        }


def sample_tensors(
    row: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str],
    said: Mapping[str, Any] | None,
    compression: Compression = "none",
) -> Iterator[tuple[Row, Member]]:
    """References, without shard and place, and members, of those roles of a sample that `dtypes` names: latents, noise,
    trajectory.

    `values` are the sample's own; what `KeptStates.facts` gave goes into the header of the trajectory. Raises SampleError for
    values that are not finite or do not fit their dtype.
    """
    layout = json.loads(row["plan_json"] or "{}").get("latent_layout", "")
    for role, suffix in (("latents", ""), ("trajectory", ".trajectory"), ("noise", ".noise")):
        if role not in dtypes:
            continue
        array = standard_normal(row["noise_key"], values["latents"].shape) if role == "noise" else values[role]
        axes = f"S {layout}" if role == "trajectory" else layout
        metadata = {"layout": axes, "plan": row["plan_json"]}
        if role == "trajectory":
            metadata["trajectory"] = json.dumps(said, sort_keys=True)
        try:
            data = safetensors_bytes(role, array, dtypes[role], metadata)
        except ValueError as error:
            raise SampleError("bad_latents", str(error)) from error
        member = member_of(f"{row['sample_id']}{suffix}", data, compression)
        yield reference(role, member, dtypes[role], array.shape, axes), member


def member_of(stem: str, data: bytes, compression: Compression) -> Member:
    """A safetensors file as a member of a shard."""
    return (f"{stem}.safetensors", data) if compression == "none" else (f"{stem}.safetensors.zst", compressed(data))


def reference(role: str, member: Member, dtype: str, shape: tuple[int, ...], layout: str) -> Row:
    """A tensor as a row refers to it, without shard and place. The sha256 is that of the member, compressed or not."""
    name, data = member
    return {
        "role": role,
        "member": name,
        "dtype": dtype,
        "shape": list(shape),
        "layout": layout,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def no_latents(model: str, key: str) -> UserError:
    return UserError(f"{key}: {model} runs whole and gives no latents; do not ask for them")


def _at(values: Any, place: int) -> float:
    return float(values[place]) if place < len(values) else 0.0
