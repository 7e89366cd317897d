"""The techniques that a plan may name, what each composes with, and a plan's list of them read and checked.

Importing this module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from infra.errors import UserError
from models.accelerate import (
    first_block,
    gated_taylor,
    guidance_interval,
    guidance_rescale,
    guidance_reuse,
    magcache,
    schedule,
    taylorseer,
)
from models.accelerate.settings import TECHNIQUE, SettingError, read, written
from models.families import Family
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan

KEY = "sampler.accelerate"

_TOKENS = "it looks at whole hidden states, and each rank there has a part of the tokens"
_BRANCHES = "both halves evaluate at the same time there, so that leaving out a branch would save nothing"
_PARTS_OF_VIDEO = "blocks of frames are at different steps there"
_SEQUENCE = {"ulysses": _TOKENS, "ring": _TOKENS}


@dataclass(frozen=True)
class Technique:
    """A row of the table.

    `decides`: which blocks are computed, or what guidance is made of; two that decide which blocks are computed do not
    compose, all others do. `apply` is for the first a context around the pipeline's call, (denoiser, config, course), and for
    the second makes a guide of a guide, (guide, config, course). `by_data`: by a sample's own data, so that a group of ranks
    has to agree. `against`: layouts of `Degrees` that it does not compose with, and why; with DualParal none does.
    """

    config: type[Any]
    apply: Callable[..., Any]
    decides: Literal["blocks", "guidance"]
    by_data: bool = False
    saves: bool = True
    against: Mapping[str, str] = field(default_factory=dict)


TECHNIQUES: dict[str, Technique] = {
    row.config.name: row
    for row in (
        Technique(first_block.FirstBlock, first_block.apply, "blocks", by_data=True, against=_SEQUENCE),
        Technique(gated_taylor.GatedTaylor, gated_taylor.apply, "blocks", by_data=True, against=_SEQUENCE),
        Technique(magcache.MagCache, magcache.apply, "blocks", against=_SEQUENCE),
        Technique(taylorseer.TaylorSeer, taylorseer.apply, "blocks"),
        Technique(schedule.Schedule, schedule.apply, "blocks"),
        Technique(guidance_rescale.GuidanceRescale, guidance_rescale.apply, "guidance", saves=False),
        Technique(guidance_reuse.GuidanceReuse, guidance_reuse.apply, "guidance", against={"cfg": _BRANCHES}),
        Technique(guidance_interval.GuidanceInterval, guidance_interval.apply, "guidance", against={"cfg": _BRANCHES}),
    )
}
"""By name, in the order in which they are applied, whatever the order in the plan: of guidance the innermost first."""


def parsed(item: Mapping[str, Any]) -> Any:
    """The configuration that an item of a plan says. SettingError names the key that is wrong."""
    name = item.get(TECHNIQUE)
    if not isinstance(name, str) or name not in TECHNIQUES:
        close = get_close_matches(str(name), TECHNIQUES, 1)
        mend = f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(TECHNIQUES)}"
        raise SettingError(TECHNIQUE, f"expected a technique, found {name!r}; {mend}")
    return read(TECHNIQUES[name].config, {key: value for key, value in item.items() if key != TECHNIQUE})


def filled(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item with every default. SettingError names the key that is wrong."""
    return written(parsed(item))


def canonical(items: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """`SamplerPlan.accelerate`: JSON with every default, in the order of the table, the same for the same techniques."""
    order = list(TECHNIQUES)
    found = sorted((filled(item) for item in items), key=lambda item: order.index(item[TECHNIQUE]))
    return tuple(json.dumps(item, sort_keys=True, separators=(",", ":")) for item in found)


def conflict(items: Iterable[Mapping[str, Any]]) -> str | None:
    """Why these techniques do not compose with each other, or None."""
    names = [str(item[TECHNIQUE]) for item in items]
    if twice := next((name for name in names if names.count(name) > 1), None):
        return f"{twice} is there twice; remove one"
    blocks = [name for name in names if TECHNIQUES[name].decides == "blocks"]
    if len(blocks) > 1:
        return f"{' and '.join(blocks)} each decide which blocks are computed; keep one"
    if {schedule.Schedule.name, guidance_reuse.GuidanceReuse.name} <= set(names):
        return "schedule says what each step computes, and guidance_reuse leaves out steps of a branch; keep one"
    return None


def configs(plan: SamplerPlan) -> list[Any]:
    """Configurations of a plan, in the order in which they are applied."""
    return [parsed(json.loads(item)) for item in canonical(map(json.loads, plan.accelerate))]


def decides_by_data(plan: SamplerPlan) -> bool:
    """Does some technique decide by a sample's own data? Then its bits depend on which of its neighbours are computed with
    it, and made again it is the same to float tolerance, or to a decision that lay at its threshold."""
    return any(TECHNIQUES[config.name].by_data for config in configs(plan))


def check(
    plan: SamplerPlan,
    family: Family | None,
    degrees: Degrees,
    *,
    teacher: bool = False,
    compiled: bool = False,
    offloaded: bool = False,
) -> None:
    """Raise a UserError that names the key where the plan's techniques cannot be applied to this family, or laid out so.

    `teacher`: another model takes the first steps. `compiled`, `offloaded`: the denoiser is.
    """
    if not plan.accelerate:
        return
    try:
        wanted = configs(plan)
    except SettingError as error:
        raise UserError(f"{KEY}: {error.key}: {error}") from error
    if said := conflict(map(json.loads, plan.accelerate)):
        raise UserError(f"{KEY}: {said}")
    if plan.blocks is not None:
        raise UserError(f"{KEY}: not with sampler.dualparal, for {_PARTS_OF_VIDEO}; remove one of the two")
    for config in wanted:
        if why := _refusal(TECHNIQUES[config.name], plan, family, degrees, teacher, compiled, offloaded):
            raise UserError(f"{KEY}: {config.name}: {why}")
        if isinstance(config, schedule.Schedule) and len(config.steps) != plan.num_inference_steps:
            raise UserError(
                f"{KEY}: schedule.steps: found {len(config.steps)} for sampler.num_inference_steps: "
                f"{plan.num_inference_steps}; give one for each step"
            )


def _refusal(
    row: Technique,
    plan: SamplerPlan,
    family: Family | None,
    degrees: Degrees,
    teacher: bool,
    compiled: bool,
    offloaded: bool,
) -> str | None:
    if family is None or row.config.name not in family.accelerators:
        return f"{family.name if family else 'a pipeline that runs whole'} has no such technique; remove it"
    for layout, why in row.against.items():
        if getattr(degrees, layout) > 1:
            return f"not with layout.parallel.{layout}: {why}; use {layout}: 1 or another technique"
    if row.decides == "guidance":
        if teacher:
            return "with generators.teacher_steps the sampler is the student's, which takes no guidance; remove it"
        if plan.guidance_scale <= 1:
            return f"sampler.guidance_scale is {plan.guidance_scale:g}, so there is no guidance; remove it"
        if offloaded:
            return "not with layout.offload: its stand-in for the denoiser would keep that on the device; set offload: none"
    elif compiled:
        return "not with layout.compile: what is computed differs from step to step; set compile: false"
    return None
