"""The student's scheduler takes Euler's steps on its teacher's own sigmas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from infra.errors import UserError
from models.distill.schedule import Schedule, student_scheduler


def teacher(shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 20])
def test_its_steps_are_eulers(steps: int) -> None:
    scheduler = student_scheduler(teacher())
    schedule = Schedule.of(scheduler, steps)
    assert (len(schedule.sigmas), len(schedule.timesteps)) == (steps + 1, steps)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    stepped, euler = x.clone(), x.double()
    for at, timestep in enumerate(scheduler.timesteps):
        stepped = scheduler.step(torch.sin(3 * stepped + at), timestep, stepped, return_dict=False)[0]
        euler = euler + (schedule.sigmas[at + 1] - schedule.sigmas[at]) * torch.sin(3 * euler + at)
    assert (stepped - euler).abs().max() < 1e-5


def test_its_corrector_is_off_or_it_would_not_step_like_euler() -> None:
    corrected = UniPCMultistepScheduler.from_config(student_scheduler(teacher()).config, disable_corrector=[])
    corrected.set_timesteps(4)
    x = torch.ones(8)
    euler = x.clone()
    for at, timestep in enumerate(corrected.timesteps):
        x = corrected.step(torch.sin(3 * x + at), timestep, x, return_dict=False)[0]
        euler = euler + (corrected.sigmas[at + 1] - corrected.sigmas[at]) * torch.sin(3 * euler + at)
    assert (x - euler).abs().max() > 1e-3


def test_four_steps_meet_every_fifth_of_the_teachers_twenty() -> None:
    whole = teacher()
    whole.set_timesteps(20)
    schedule = Schedule.of(student_scheduler(teacher()), 4)
    assert schedule.sigmas == tuple(whole.sigmas.double().tolist()[::5])
    assert schedule.timesteps == tuple(whole.timesteps.double().tolist()[::5])


def test_the_shift_is_the_samples_or_the_teachers() -> None:
    assert student_scheduler(teacher(5.0)).config.flow_shift == 5.0
    assert student_scheduler(teacher(5.0), 7.0).config.flow_shift == 7.0
    assert student_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)).config.flow_shift == 3.0


def test_a_teacher_that_predicts_noise_is_refused() -> None:
    with pytest.raises(UserError, match="DDIMScheduler predicts no flow"):
        student_scheduler(DDIMScheduler())
