"""Schedulers of a plan: diffusers' own, configured from the checkpoint's."""

from __future__ import annotations

import inspect
from typing import Any

from infra.errors import UserError
from models.plan import SamplerPlan

_FLOW = {
    "unipc": "UniPCMultistepScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "flow_match_euler": "FlowMatchEulerDiscreteScheduler",
    "euler_trailing": "FlowMatchEulerDiscreteScheduler",
}
_DIFFUSION = {
    "unipc": "UniPCMultistepScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
}
_COGVIDEOX = {"ddim": "CogVideoXDDIMScheduler", "dpmpp": "CogVideoXDPMScheduler"}


def build_scheduler(base: Any, plan: SamplerPlan, sets_sigmas: bool = False) -> Any:
    """A fresh scheduler for `plan`, from `base`, the checkpoint's own: its kind of noise schedule is kept.

    `sets_sigmas` says that the pipeline brings its own sigmas. A plan that the checkpoint cannot follow is a UserError
    that names the key.
    """
    import diffusers

    config = dict(base.config)
    if plan.scheduler == "default":
        kind = type(base)
    else:
        table = _COGVIDEOX if type(base).__name__.startswith("CogVideoX") else _FLOW if is_flow(base) else _DIFFUSION
        if plan.scheduler not in table:
            raise UserError(
                f"sampler.scheduler: {plan.scheduler} cannot follow {type(base).__name__}, the checkpoint's own; "
                f"choose one of: default, {', '.join(table)}"
            )
        kind = getattr(diffusers, table[plan.scheduler])
        if is_flow(base) and kind is not type(base):
            config |= _flow_config(config)
    if sets_sigmas and "sigmas" not in inspect.signature(kind.set_timesteps).parameters:
        raise UserError(
            f"sampler.scheduler: {kind.__name__} cannot follow the sigmas that this pipeline sets; choose default"
        )
    if plan.shift is not None:
        if not is_flow(base):
            raise UserError(
                f"sampler.shift: {type(base).__name__} is not a flow's scheduler and has no shift; remove it"
            )
        config |= {"flow_shift": plan.shift, "shift": plan.shift, "use_dynamic_shifting": False}
    scheduler = kind.from_config(config)
    if plan.scheduler == "euler_trailing":
        # Its own sigmas of N steps end at the smallest of training, shifted twice; these are 1, (N-1)/N, ... 1/N, 0, shifted.
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / plan.num_inference_steps
    return scheduler


def is_flow(scheduler: Any) -> bool:
    """Does the checkpoint predict a flow (velocity of a straight path) rather than noise?"""
    config = scheduler.config
    return type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def _flow_config(config: dict[str, Any]) -> dict[str, Any]:
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "shift": shift}
