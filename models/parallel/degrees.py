"""The degrees of a parallel layout, and the mesh of ranks that they make."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infra.errors import UserError
from models.families import Family

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KEY = "layout.parallel"
ATTENTION = "layout.attention"

Attention = Literal["native", "flash", "flash_3", "flash_4", "cudnn"]
"""Kernels of self-attention: torch's own, or one of xfuser's, which all compute the same."""


@dataclass(frozen=True)
class Degrees:
    """How many ranks share the work in each way. They multiply, but for `vae`: the same ranks decode."""

    cfg: int = 1
    """Branches of classifier-free guidance: 1 or 2."""
    ulysses: int = 1
    ring: int = 1
    tensor: int = 1
    dualparal: int = 1
    """Stages of the DualParal pipeline."""
    vae: int = 1
    """Ranks that decode tiles: one, or all of the group."""

    @property
    def size(self) -> int:
        """Ranks of a sampler group."""
        return self.dualparal * self.cfg * self.ring * self.ulysses * self.tensor

    def check(self, *, heads: int, layers: int, guided: bool) -> None:
        """Raise a UserError that names the numbers where a denoiser of so many heads and layers does not fit."""
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"{KEY}.{field.name}: expected 1 or more, found {getattr(self, field.name)}")
        if self.cfg > 2:
            raise UserError(f"{KEY}.cfg: guidance has two branches, found {self.cfg}; use 1 or 2")
        if self.cfg == 2 and not guided:
            raise UserError(f"{KEY}.cfg: 2 branches want guidance_scale above 1; use cfg: 1")
        if heads % self.tensor:
            raise UserError(
                f"{KEY}.tensor: {heads} heads cannot be shared by {self.tensor} ranks; use a divisor of {heads}"
            )
        if self.ulysses > heads // self.tensor:
            raise UserError(
                f"{KEY}.ulysses: {self.ulysses} ranks for {heads // self.tensor} heads leave some idle; use ring for the rest"
            )
        if self.dualparal > layers:
            raise UserError(f"{KEY}.dualparal: {self.dualparal} stages for {layers} layers; use at most {layers}")
        if self.vae not in (1, self.size):
            raise UserError(
                f"{KEY}.vae: one rank decodes or all of the group do, found {self.vae} of {self.size}; use 1 or {self.size}"
            )


def check_layout(
    folder: str, family: Family | None, degrees: Degrees, *, guided: bool, blocks: tuple[int, int] | None = None
) -> None:
    """Raise a UserError where the checkpoint in `folder` cannot be laid out so; it reads configurations only.

    `blocks` is the plan's, where DualParal samples.
    """
    if blocks is not None:
        _check_blocks(folder, family, degrees)
    elif degrees.dualparal > 1:
        raise UserError(f"{KEY}.dualparal: {degrees.dualparal} stages want sampler.dualparal; set it, or use 1")
    for field in fields(degrees):
        degree = getattr(degrees, field.name)
        if degree > 1 and (family is None or field.name not in family.layouts):
            name = family.name if family else "a pipeline that runs whole"
            raise UserError(f"{KEY}.{field.name}: {name} has no such layout, found {degree}; use 1")
    if degrees == Degrees():
        return
    for path in sorted(Path(folder).glob("transformer*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        degrees.check(heads=config["num_attention_heads"], layers=config["num_layers"], guided=guided)


def _check_blocks(folder: str, family: Family | None, degrees: Degrees) -> None:
    if family is None or "dualparal" not in family.layouts:
        raise UserError(
            f"sampler.dualparal: {family.name if family else 'a pipeline that runs whole'} is not sampled in blocks"
        )
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    if index.get("expand_timesteps"):
        raise UserError(
            "sampler.dualparal: checkpoints with a timestep for each token are not sampled in blocks; remove it"
        )
    if degrees.ring > 1 or degrees.tensor > 1:
        raise UserError(
            f"{KEY}: sampler.dualparal composes with cfg and ulysses, not with ring or tensor; set those to 1"
        )


def check_attention(family: Family | None, attention: Attention) -> None:
    """Raise a UserError where the family's self-attention cannot be given that kernel."""
    if attention != "native" and (family is None or not family.layouts):
        name = family.name if family else "a pipeline that runs whole"
        raise UserError(f"{ATTENTION}: {name} keeps its own attention, found {attention}; use native")


AXES = ("dualparal", "cfg", "ring", "ulysses", "tensor")
"""Axes of the mesh, slowest first: ranks that exchange most are neighbours."""


def build_mesh(degrees: Degrees, device: str = "cpu") -> DeviceMesh:
    """The mesh of a group's ranks. Every rank of the default process group calls it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, tuple(getattr(degrees, axis) for axis in AXES), mesh_dim_names=AXES)
