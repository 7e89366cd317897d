"""A teacher's path: chosen states between the noise and the final latent, taken by the pipeline's own step callback.

A path of N steps has N+1 states. Here a state's place is named before the step: 0 is what the first step starts from, the
noise, k is what step k starts from, N is the final latent. Trainers count in two ways, so users may too:

    before   N+1 states, state k is what step k starts from, -1 the final latent      CausVid, Self-Forcing
    after    N states, state k is what step k made, -1 the final latent               FastVideo
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from infra.errors import UserError

if TYPE_CHECKING:
    import torch

Convention = Literal["before", "after"]


def places_of(keep: Literal["all"] | Sequence[int], convention: Convention, steps: int) -> tuple[int, ...]:
    """The places, ascending, of the states that `keep` names among those of a path of `steps` steps.

    ValueError where it names none, one that is not there, or one twice.
    """
    count, first = (steps + 1, 0) if convention == "before" else (steps, 1)
    if keep == "all":
        return tuple(range(first, first + count))
    if not keep:
        raise ValueError("expected all, or at least one state, found none")
    places: dict[int, int] = {}
    for index in keep:
        if not -count <= index < count:
            raise ValueError(
                f"expected states from {-count} to {count - 1}, the {count} of {steps} steps that are named"
                f" {convention} the step, found {index}"
            )
        place = first + index % count
        if place in places:
            raise ValueError(f"expected each state once, found {places[place]} and {index}, which are the same")
        places[place] = index
    return tuple(sorted(places))


class Path:
    """Collects the states at `places` of paths of `steps` steps, sample after sample as they are denoised.

    Values are what the pipeline holds, cast to float32, which loses nothing of them. Where a plan was cut to fewer steps
    to try it, places that it does not reach hold the final latent.
    """

    def __init__(self, places: Sequence[int], steps: int) -> None:
        self.places, self.steps = tuple(places), steps
        self._batches: list[np.ndarray] = []

    @property
    def states(self) -> np.ndarray:
        """[n, S, *latent_shape] float32, of all samples so far."""
        return np.concatenate(self._batches)

    def callback(
        self, start: torch.Tensor, unpack: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
        """`callback_on_step_end` of a pipeline that is given `start`, packed noise, as its latents.

        `unpack` turns what the pipeline holds into [n, *latent_shape].
        """
        found: list[np.ndarray] = []

        def keep(place: int, latents: torch.Tensor) -> None:
            if place in self.places:
                found.append(unpack(latents).float().cpu().numpy().copy())  # on a CPU it may be the pipeline's own

        def step_ended(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                # Schedulers of no flow start from noise of another scale; it is known once their timesteps are set.
                keep(0, start * getattr(pipe.scheduler, "init_noise_sigma", 1.0))
            keep(step + 1, values["latents"])
            if step + 1 == self.steps:
                found.extend([unpack(values["latents"]).float().cpu().numpy()] * (len(self.places) - len(found)))
                self._batches.append(np.stack(found, axis=1))
            return {}

        return step_ended


def check_scheduler(scheduler: Any) -> None:
    """UserError for a scheduler that asks the denoiser more than once a step: its states have no place."""
    if scheduler.order != 1:
        raise UserError(
            f"sampler.scheduler: {type(scheduler).__name__} takes {scheduler.order} turns a step, so the states of a"
            " trajectory have no place; choose unipc, dpmpp or euler"
        )
