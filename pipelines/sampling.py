"""The spec's sampler plan: its sections, and what of it does not go together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.accelerate.registry import canonical, conflict, filled
from models.accelerate.settings import SettingError
from models.plan import SamplerPlan
from pipelines.operating_point import least_for
from pipelines.quality import QualityBudget
from pipelines.sections import Section

PLAN_KEYS = (
    "scheduler",
    "num_inference_steps",
    "guidance_scale",
    "shift",
    "max_sequence_length",
    "sigmas",
    "solver_order",
    "accelerate",
)
"""Keys of `sampler` that a plan file says."""


def _filled(value: Any) -> Any:
    return filled(value) if isinstance(value, dict) else value


class DualParal(Section):
    """Long video as a queue of blocks of latent frames, each denoised beside its neighbours (arXiv 2505.21070)."""

    frames: int = Field(8, ge=1, description="Latent frames of a block.")
    context: int = Field(4, ge=0, description="Latent frames of the blocks before and after that a block sees.")
    scenes: str | None = Field(
        None,
        min_length=1,
        description="What stands between the scenes of a prompt, which share the blocks evenly; without it, or where a"
        " prompt does not hold it, all blocks see the whole prompt.",
    )
    fade: float = Field(2.0, ge=0, description="Blocks over which a scene gives way to the next.")

    @model_validator(mode="after")
    def _context_fits(self) -> DualParal:
        if self.context > self.frames:
            raise ValueError(f"context is at most frames, found {self.context} and {self.frames}")
        return self


class EarlyReject(Section):
    """Samples that will almost surely be rejected are not finished; no part of a sample's identity."""

    loss: float = Field(
        0.01, gt=0, lt=1, description="Most of the good samples that may be lost, as a share, held with 95% confidence."
    )
    at: float = Field(
        0.7,
        gt=0,
        lt=1,
        description="Noise level, 1 for pure noise: samples are looked at after the first step that starts at or below it.",
    )
    frames: int = Field(
        3,
        ge=1,
        description="Latent frames of the estimate that are decoded, the first ones; as many as there are, at most.",
    )
    questions: tuple[str, ...] = Field(
        (),
        description="The rubric's questions that are asked of it, by judge.screen if there is one, else by the judge;"
        " their mean by weight is the score. None: all that it is asked anyway.",
    )
    call: str | None = Field(
        None,
        description="Or a score of your own, as judge.call: module:function, which gives one score, higher is better.",
    )
    version: str | None = Field(None, description="Version of that code.")
    calibration: int | None = Field(
        None,
        ge=1,
        description="Good samples that go to their end before any is stopped; more of them find a closer threshold. Left out,"
        " the fewest that can hold `loss`: 299 for 0.01.",
    )
    hold_out: float = Field(
        0.02, gt=0, lt=1, description="Share of what would be stopped that goes on, to measure what is lost."
    )

    @model_validator(mode="after")
    def _is_sound(self) -> EarlyReject:
        if self.call is not None and not self.version:
            raise ValueError("call needs a version")
        if self.call is not None and self.questions:
            raise ValueError("questions are asked of a model, and call is code of your own; remove one of the two")
        least = least_for(self.loss)
        if self.calibration is not None and self.calibration < least:
            raise SettingError(
                "calibration", f"expected at least {least}, which loss: {self.loss:g} needs, found {self.calibration}"
            )
        return self


class Sampler(Section):
    """The sampler plan: what is meant to change the result."""

    plan: str | None = Field(
        None,
        min_length=1,
        description="A plan file made by `ditmill tune`, or a folder of them, of which the cheapest for this checkpoint and"
        " bucket is taken; `auto` is the folder `plans` beside the dataset. Its keys replace those below, once for a dataset"
        " (see docs/acceleration.md).",
    )
    budget: QualityBudget | None = Field(
        None, description="What the plan may lose; left out, that which it was tuned to."
    )
    scheduler: Literal["default", "unipc", "euler", "euler_trailing", "flow_match_euler", "dpmpp", "ddim"] = Field(
        "default",
        description="default is the checkpoint's own; euler_trailing: a flow's sigmas from 1 to 0 in even steps, shifted,"
        " as CausVid, Self-Forcing and HunyuanVideo take them.",
    )
    num_inference_steps: int = Field(20, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(5.0, ge=0, description="Classifier-free guidance; 1 turns it off.")
    shift: float | None = Field(None, description="Flow shift; left out, the checkpoint's own.")
    max_sequence_length: int = Field(
        512, ge=1, description="Tokens that a prompt is padded or cut to, where the family does."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the denoiser; auto is bfloat16 on an accelerator and float32 on a CPU."
    )
    dualparal: DualParal | None = Field(
        None, description="Sample in blocks, for video longer than a denoiser takes at once; Wan text-to-video."
    )
    sigmas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None,
        description="A flow's noise level at each step, descending, as the denoiser meets it: no shift is applied to them"
        " (arXiv 2309.10438 searches them); left out, the scheduler's own.",
    )
    solver_order: int | None = Field(
        None, ge=1, le=3, description="Order of unipc and dpmpp; left out, the checkpoint's own or 2."
    )
    accelerate: tuple[Annotated[dict[str, Any], BeforeValidator(_filled)], ...] = Field(
        (), description="Techniques that skip work, each {technique: NAME} with its own keys, which are below."
    )
    early_reject: EarlyReject | None = Field(
        None, description="Do not finish samples that will almost surely be rejected; left out, all are finished."
    )

    @model_validator(mode="after")
    def _budget_is_of_a_plan(self) -> Sampler:
        if self.budget is not None and self.plan is None:
            raise SettingError("budget", "it chooses among plans, found no plan; add plan: auto, or remove it")
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Sampler:
        if self.sigmas is None:
            return self
        if len(self.sigmas) != self.num_inference_steps:
            raise SettingError(
                "sigmas",
                f"expected one for each of num_inference_steps: {self.num_inference_steps}, found {len(self.sigmas)}",
            )
        if any(after >= before for before, after in pairwise(self.sigmas)):
            raise SettingError("sigmas", f"expected each to be less than the one before, found {list(self.sigmas)}")
        if self.shift is not None or self.scheduler == "euler_trailing":
            other = "shift" if self.shift is not None else "scheduler: euler_trailing"
            raise SettingError("sigmas", f"they are taken as they are, found {other} too; remove one of the two")
        return self

    @model_validator(mode="after")
    def _techniques_compose(self) -> Sampler:
        if said := conflict(self.accelerate):
            raise SettingError("accelerate", said)
        return self


def planned(sampler: Sampler, keys: Mapping[str, Any]) -> Sampler:
    """`sampler` with the keys of a plan file in the place of its own. pydantic's ValidationError where they are none."""
    left = sampler.model_dump(exclude={*PLAN_KEYS})
    return Sampler.model_validate(left | {name: keys[name] for name in PLAN_KEYS if name in keys})


def sampler_keys(plan: SamplerPlan) -> dict[str, Any]:
    """A plan as a spec's `sampler` says it; what it leaves to its defaults is left out."""
    said = {name: getattr(plan, name) for name in PLAN_KEYS}
    said["accelerate"] = [json.loads(item) for item in plan.accelerate]
    said["sigmas"] = None if plan.sigmas is None else list(plan.sigmas)
    return {name: value for name, value in said.items() if value is not None and value != []}


def sampler_plan(sampler: Sampler) -> SamplerPlan:
    """What the keys of a spec's `sampler` mean."""
    blocks = sampler.dualparal
    return SamplerPlan(
        scheduler=sampler.scheduler,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        shift=sampler.shift,
        max_sequence_length=sampler.max_sequence_length,
        dtype=sampler.dtype,
        accelerate=canonical(sampler.accelerate),
        blocks=None if blocks is None else (blocks.frames, blocks.context),
        scenes=None if blocks is None or blocks.scenes is None else (blocks.scenes, blocks.fade),
        sigmas=sampler.sigmas,
        solver_order=sampler.solver_order,
    )
