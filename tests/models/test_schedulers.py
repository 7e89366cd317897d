from __future__ import annotations

from typing import Any

import pytest

from infra.errors import UserError
from models.plan import SamplerPlan
from models.schedulers import build_scheduler


def _flow() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _flow_euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _heun() -> Any:
    from diffusers import FlowMatchHeunDiscreteScheduler

    return FlowMatchHeunDiscreteScheduler()


def _noise() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize(
    ("base", "name", "kind"),
    [
        (_flow, "default", "UniPCMultistepScheduler"),
        (_flow, "euler", "FlowMatchEulerDiscreteScheduler"),
        (_flow, "dpmpp", "DPMSolverMultistepScheduler"),
        (_flow_euler, "unipc", "UniPCMultistepScheduler"),
        (_flow_euler, "flow_match_euler", "FlowMatchEulerDiscreteScheduler"),
        (_noise, "default", "EulerDiscreteScheduler"),
        (_noise, "ddim", "DDIMScheduler"),
        (_noise, "dpmpp", "DPMSolverMultistepScheduler"),
    ],
)
def test_build_scheduler_keeps_the_kind_of_schedule(base: Any, name: str, kind: str) -> None:
    scheduler = build_scheduler(base(), SamplerPlan(scheduler=name))
    assert type(scheduler).__name__ == kind
    if base is not _noise:
        config = scheduler.config
        assert config.get("flow_shift", config.get("shift")) == 3.0
        assert kind.startswith("FlowMatch") or (config["use_flow_sigmas"], config["prediction_type"]) == (
            True,
            "flow_prediction",
        )
    else:
        assert scheduler.config["beta_end"] == 0.012


@pytest.mark.parametrize("base", [_flow, _flow_euler])
def test_trailing_sigmas_are_those_of_the_trainers(base: Any) -> None:
    """CausVid trains at t = 1000, 757 and 522, Self-Forcing at 1000, 937.5, 833 and 625 with shift 5."""
    for steps, shift, places, timesteps in (
        (50, 8.0, [0, 36, 44], [1000, 756.757, 521.739]),
        (48, 5.0, [0, 12, 24, 36], [1000, 937.5, 833.333, 625]),
    ):
        scheduler = build_scheduler(
            base(), SamplerPlan(scheduler="euler_trailing", num_inference_steps=steps, shift=shift)
        )
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[places].tolist() == pytest.approx(timesteps, abs=1e-2)
        assert scheduler.sigmas[[*places, -1]].tolist() == pytest.approx([t / 1000 for t in timesteps] + [0], abs=1e-5)


@pytest.mark.parametrize("name", ["unipc", "dpmpp"])
def test_shift_moves_sigmas_as_the_formula_says(name: str) -> None:
    """sigma' = s sigma / (1 + (s - 1) sigma), of sigmas that are 1 - k/n without a shift."""
    import torch

    scheduler = build_scheduler(_flow(), SamplerPlan(scheduler=name, shift=5.0))
    scheduler.set_timesteps(4)
    plain = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(scheduler.sigmas, 5 * plain / (1 + 4 * plain), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("base", "plan", "key"),
    [
        (_flow, SamplerPlan(scheduler="ddim"), "sampler.scheduler: ddim"),
        (_noise, SamplerPlan(scheduler="flow_match_euler"), "sampler.scheduler: flow_match_euler"),
        (_noise, SamplerPlan(scheduler="euler_trailing"), "sampler.scheduler: euler_trailing"),
        (_noise, SamplerPlan(shift=3.0), "sampler.shift: "),
    ],
)
def test_build_scheduler_refuses_what_cannot_work(base: Any, plan: SamplerPlan, key: str) -> None:
    with pytest.raises(UserError) as error:
        build_scheduler(base(), plan)
    assert str(error.value).startswith(key)


def test_build_scheduler_refuses_solvers_without_sigmas() -> None:
    with pytest.raises(UserError, match=r"^sampler\.scheduler: DPMSolver"):
        build_scheduler(_flow(), SamplerPlan(scheduler="dpmpp"), sets_sigmas=True)


def test_build_scheduler_starts_fresh() -> None:
    base = _flow()
    assert build_scheduler(base, SamplerPlan()) is not base


def test_shift_reaches_a_scheduler_whose_checkpoint_says_none() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    euler = build_scheduler(FlowMatchEulerDiscreteScheduler(), SamplerPlan(shift=5.0))
    assert euler.shift == 5.0
    base = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert build_scheduler(base, SamplerPlan(shift=5.0)).config.flow_shift == 5.0


SIGMAS = (1.0, 0.9, 0.6, 0.25)


@pytest.mark.parametrize("base", [_flow, _flow_euler])
@pytest.mark.parametrize("name", ["default", "unipc", "dpmpp", "euler"])
def test_given_sigmas_are_those_that_the_denoiser_meets(base: Any, name: str) -> None:
    """Not shifted, although the checkpoint's shift is 3, and whatever the pipeline brings."""
    import torch

    plan = SamplerPlan(scheduler=name, num_inference_steps=4, sigmas=SIGMAS)
    scheduler = build_scheduler(base(), plan)
    for given in ({"num_inference_steps": 4}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}):
        scheduler.set_timesteps(**given)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([*SIGMAS, 0.0]), atol=2e-6, rtol=0)
        first, *others = scheduler.timesteps.tolist()
        assert first in (999, 1000)  # multistep solvers stop short of pure noise
        assert others == pytest.approx([900, 600, 250], abs=1e-3)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["unipc", "dpmpp", "euler"])
def test_given_sigmas_lead_along_a_straight_path_to_its_end(name: str, order: int) -> None:
    """Where the velocity is noise - clean everywhere, any solver of any order on any sigmas ends in the clean sample."""
    import torch

    clean, noise = torch.full((1, 2), 0.5), torch.tensor([[1.0, -2.0]])
    multistep = {} if name == "euler" else {"solver_order": order}
    plan = SamplerPlan(scheduler=name, num_inference_steps=4, sigmas=SIGMAS, **multistep)  # type: ignore[arg-type]
    scheduler = build_scheduler(_flow(), plan)
    scheduler.set_timesteps(4)
    state = noise
    for timestep in scheduler.timesteps:
        state = scheduler.step(noise - clean, timestep, state, return_dict=False)[0]
    torch.testing.assert_close(state, clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["unipc", "dpmpp"])
def test_solver_order_is_the_solvers(name: str) -> None:
    import torch

    def end(order: int | None) -> torch.Tensor:
        scheduler = build_scheduler(_flow(), SamplerPlan(scheduler=name, num_inference_steps=8, solver_order=order))
        assert scheduler.config.solver_order == (order or 2)
        scheduler.set_timesteps(8)
        state = torch.ones(1, 2)
        for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            state = scheduler.step(state * sigma**2, timestep, state, return_dict=False)[0]
        return state

    ends = [end(order) for order in (1, 2, 3)]
    assert len({round(float(each[0, 0]), 5) for each in ends}) == 3
    torch.testing.assert_close(end(None), ends[1])


@pytest.mark.parametrize(
    ("base", "plan", "key"),
    [
        (_flow, SamplerPlan(scheduler="euler", solver_order=2), "sampler.solver_order: FlowMatchEuler"),
        (_noise, SamplerPlan(solver_order=2), "sampler.solver_order: EulerDiscreteScheduler"),
        (
            _noise,
            SamplerPlan(sigmas=(1.0,), num_inference_steps=1),
            "sampler.sigmas: EulerDiscreteScheduler is not a flow",
        ),
        (
            _flow,
            SamplerPlan(sigmas=(1.0, 0.9004, 0.9), num_inference_steps=3),
            "sampler.sigmas: 0.9004 and 0.9 are one timestep",
        ),
        (_heun, SamplerPlan(sigmas=(1.0, 0.5), num_inference_steps=2), "sampler.sigmas: FlowMatchHeun"),
    ],
)
def test_build_scheduler_refuses_steps_that_it_cannot_take(base: Any, plan: SamplerPlan, key: str) -> None:
    with pytest.raises(UserError) as error:
        build_scheduler(base(), plan)
    assert str(error.value).startswith(key)
