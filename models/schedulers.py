"""Schedulers of a plan: diffusers' own, configured from the checkpoint's."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import numpy as np

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
    changed: dict[str, Any] = {}
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
            changed |= _flow_config(config)
    if sets_sigmas and "sigmas" not in inspect.signature(kind.set_timesteps).parameters:
        raise UserError(
            f"sampler.scheduler: {kind.__name__} cannot follow the sigmas that this pipeline sets; choose default"
        )
    if plan.solver_order is not None:
        if "solver_order" not in inspect.signature(kind.__init__).parameters:
            raise UserError(
                f"sampler.solver_order: {kind.__name__} has none; choose scheduler unipc or dpmpp, or remove it"
            )
        changed["solver_order"] = plan.solver_order
    if plan.sigmas is not None:
        if not is_flow(base):
            raise UserError(f"sampler.sigmas: {type(base).__name__} is not a flow's scheduler; remove them")
        _check_sigmas(kind, plan.sigmas, config["num_train_timesteps"])
        changed |= _AS_THEY_ARE
    if plan.shift is not None:
        if not is_flow(base):
            raise UserError(
                f"sampler.shift: {type(base).__name__} is not a flow's scheduler and has no shift; remove it"
            )
        changed |= {"flow_shift": plan.shift, "shift": plan.shift, "use_dynamic_shifting": False}
    # diffusers drops values that the checkpoint left out, even where they have been set since.
    left_out = [name for name in config.get("_use_default_values", ()) if name not in changed]
    scheduler = kind.from_config(config | changed | {"_use_default_values": left_out})
    if plan.sigmas is not None:
        scheduler.set_timesteps = _Given(scheduler, plan.sigmas)
    if plan.scheduler == "euler_trailing":
        # Its own sigmas of N steps end at the smallest of training, shifted twice; these are 1, (N-1)/N, ... 1/N, 0, shifted.
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / plan.num_inference_steps
    return scheduler


def _check_sigmas(kind: Any, sigmas: tuple[float, ...], trained: int) -> None:
    if kind.__name__ != _FLOW["dpmpp"] and "sigmas" not in inspect.signature(kind.set_timesteps).parameters:
        raise UserError(f"sampler.sigmas: {kind.__name__} takes none; choose scheduler unipc, dpmpp or euler")
    for before, after in pairwise(sigmas):
        if int(before * trained) == int(after * trained):
            raise UserError(
                f"sampler.sigmas: {before:g} and {after:g} are one timestep of the {trained} that the checkpoint knows; "
                "give sigmas that lie further apart"
            )


_AS_THEY_ARE = {
    **dict.fromkeys(("flow_shift", "shift"), 1.0),
    **dict.fromkeys(("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False),
    "use_flow_sigmas": True,
    "shift_terminal": None,
    "final_sigmas_type": "zero",
    "invert_sigmas": False,
}
"""Of a flow's scheduler: sigmas that it is given are those that the denoiser meets."""

_FIRST = 1 - 1e-6
"""Largest sigma of a multistep solver, which takes the logarithm of 1 - sigma. diffusers' UniPC holds it there too."""


class _Given:
    """`set_timesteps` of a scheduler whose sigmas are given, whatever number of steps or sigmas the pipeline brings.

    diffusers' DPM++ takes no sigmas, and its own are then replaced as it would have set them.
    """

    def __init__(self, scheduler: Any, sigmas: tuple[float, ...]) -> None:
        self.scheduler, self.sigmas, self.own = scheduler, sigmas, scheduler.set_timesteps
        self.takes = "sigmas" in inspect.signature(self.own).parameters

    def __call__(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        if self.takes:
            self.own(sigmas=np.asarray(self.sigmas), device=device)
            return
        import torch

        self.own(len(self.sigmas), device=device)
        given = torch.tensor([*self.sigmas, 0.0], dtype=torch.float64).clamp(max=_FIRST)
        trained = self.scheduler.config.num_train_timesteps
        self.scheduler.sigmas = given.float()
        self.scheduler.timesteps = (given[:-1] * trained).to(device=device, dtype=torch.int64)


def is_flow(scheduler: Any) -> bool:
    """Does the checkpoint predict a flow (velocity of a straight path) rather than noise?"""
    config = scheduler.config
    return type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def _flow_config(config: dict[str, Any]) -> dict[str, Any]:
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "shift": shift}
