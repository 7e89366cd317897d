"""The student's own schedule: a scheduler whose steps are Euler's, bit for bit but rounding, on the teacher's sigmas.

UniPC of order 1 without its corrector is Euler's step for a flow: x_t = s_t/s_s x_s + (1 - s_t/s_s) (x_s - s_s v)
= x_s + (s_t - s_s) v, the last step to s = 0 too. Its sigmas and timesteps are those of the teacher's UniPC: 4 steps meet
every fifth of 20. (DPMSolverMultistep of order 1 steps alike, but on sigmas that start at 0.99967.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra.errors import UserError
from models.schedulers import is_flow

CORRECTED = 100
"""Steps of the longest schedule that is free of the corrector."""


@dataclass(frozen=True)
class Schedule:
    """Where a scheduler of n steps goes."""

    sigmas: tuple[float, ...]
    """n + 1, falling to 0."""
    timesteps: tuple[float, ...]
    """n, that the denoiser is given."""

    @classmethod
    def of(cls, scheduler: Any, num_inference_steps: int) -> Schedule:
        """Of a scheduler as a pipeline sets it."""
        scheduler.set_timesteps(num_inference_steps)
        return cls(tuple(scheduler.sigmas.double().tolist()), tuple(scheduler.timesteps.double().tolist()))


def student_scheduler(teacher: Any, shift: float | None = None) -> Any:
    """A scheduler for a student of the flow that `teacher`, a scheduler of diffusers, belongs to. `shift` replaces its own,
    where the samples were made with another. UserError where it is no flow's."""
    from diffusers import UniPCMultistepScheduler

    if not is_flow(teacher):
        raise UserError(
            f"teacher: its {type(teacher).__name__} predicts no flow, and students of others are not supported"
        )
    config = teacher.config
    found = shift if shift is not None else config.get("flow_shift", config.get("shift", 1.0))
    return UniPCMultistepScheduler(
        num_train_timesteps=config.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=float(found),
        solver_order=1,
        disable_corrector=list(range(CORRECTED)),
    )
