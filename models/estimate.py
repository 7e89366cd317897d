"""The clean latent that a denoiser's prediction stands for: where the path would end if it were straight from here on.

With state x and prediction p at a step, of a flow (arXiv 2210.02747) at noise level s, and of diffusion (arXiv 2006.11239;
velocities as in arXiv 2202.00512) with alpha^2 + sigma^2 = 1,

    x0 = x - s p                 flow
    x0 = (x - sigma p) / alpha   noise
    x0 = alpha x - sigma p       velocity

Schedulers whose states have variance 1 + (sigma / alpha)^2 hold x / alpha in the place of x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from models.schedulers import is_flow

if TYPE_CHECKING:
    from torch import Tensor


def noise_levels(scheduler: Any) -> np.ndarray:
    """Share of noise in the state that each step starts from, float64 [steps], descending from about 1 to above 0.

    Of a scheduler whose timesteps are set: a flow's sigmas, of diffusion the standard deviation of the noise where that of
    state is 1.
    """
    if is_flow(scheduler):
        return np.asarray(scheduler.sigmas.cpu(), dtype=np.float64)[: len(scheduler.timesteps)]
    if getattr(scheduler, "sigmas", None) is not None:
        ratio = np.asarray(scheduler.sigmas.cpu(), dtype=np.float64)[: len(scheduler.timesteps)]
        return np.asarray(ratio / np.sqrt(1 + ratio**2))
    kept = np.asarray(scheduler.alphas_cumprod.cpu(), dtype=np.float64)[np.asarray(scheduler.timesteps.cpu())]
    return np.asarray(np.sqrt(1 - kept))


def clean_estimate(scheduler: Any, step: int, prediction: Tensor, state: Tensor) -> Tensor:
    """The clean latents float32 of the shape of `state`, which step number `step` starts from."""
    level = float(noise_levels(scheduler)[step])
    state, prediction = state.float(), prediction.float()
    if is_flow(scheduler):
        return state - level * prediction
    alpha = float(np.sqrt(1 - level**2))
    if float(scheduler.init_noise_sigma) > 1:
        state = state * alpha
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (state - level * prediction) / alpha
    if kind == "v_prediction":
        return alpha * state - level * prediction
    if kind == "sample":
        return prediction
    raise ValueError(f"{type(scheduler).__name__} predicts {kind!r}, of which no estimate is known")
