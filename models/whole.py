"""Pipelines of no family, run whole: prompts in, pixels out, one sample at a time.

One at a time, because nothing is known of how such a pipeline pads its texts: so a sample never depends on its neighbours.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from infra.errors import UserError
from models.noise import standard_normal
from models.plan import SamplerPlan


def run_whole(
    pipe: Any,
    prompt: str,
    negative_prompt: str,
    noise_key: str,
    plan: SamplerPlan,
    height: int,
    width: int,
    num_frames: int,
    fps: float,
    shapes: dict[tuple[int, int, int], tuple[int, ...] | None],
) -> np.ndarray:
    """Frames [num_frames, height, width, 3] uint8 of one sample.

    The pipeline starts from the sample's own noise where its call takes `latents`; otherwise from a torch generator
    that the noise key seeds, which is the same on one kind of machine only. `shapes` remembers latent shapes.
    """
    import torch

    known = inspect.signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "max_sequence_length": plan.max_sequence_length,
        "frame_rate": fps,
        "generator": torch.Generator().manual_seed(int(noise_key[:15], 16)),
        "output_type": "np",
        "use_resolution_binning": False,
    }
    if negative_prompt:
        wanted["negative_prompt"] = negative_prompt
    arguments = {name: value for name, value in wanted.items() if name in known}
    with torch.inference_mode():
        media = (height, width, num_frames)
        if media not in shapes:
            shapes[media] = _latents_shape(pipe, arguments) if "latents" in known else None
        if (shape := shapes[media]) is not None:
            noise = torch.from_numpy(standard_normal(noise_key, shape))[None]
            arguments["latents"] = noise.to(pipe._execution_device, pipe.dtype)
        output = pipe(**arguments)
    return _frames(output, height, width, num_frames)


class _ShapeFound(Exception):
    """The shape is known; the rest of the call is not needed."""


def _latents_shape(pipe: Any, arguments: dict[str, Any]) -> tuple[int, ...] | None:
    """Shape of one sample's latents: the pipeline is run as far as the noise that it would draw itself."""
    if not hasattr(pipe, "prepare_latents"):
        return None
    prepare = pipe.prepare_latents
    found: list[tuple[int, ...]] = []

    def observe(*args: Any, **kwargs: Any) -> Any:
        latents = prepare(*args, **kwargs)
        latents = latents[0] if isinstance(latents, tuple) else latents
        found.append(tuple(latents.shape[1:]))
        raise _ShapeFound

    pipe.prepare_latents = observe
    try:
        pipe(**arguments)
    except _ShapeFound:
        return found[0]
    finally:
        del pipe.prepare_latents
    return None


def _frames(output: Any, height: int, width: int, num_frames: int) -> np.ndarray:
    values = getattr(output, "frames", None)
    if values is None:
        values = getattr(output, "images", None)
    if values is None:
        raise UserError(
            f"generators.model: the pipeline returned {type(output).__name__}, with neither frames nor images"
        )
    array = np.asarray(values)[0]
    array = array[None] if array.ndim == 3 else array
    if array.shape != (num_frames, height, width, 3):
        raise UserError(
            f"buckets: the pipeline made {'x'.join(map(str, array.shape))}, expected {num_frames}x{height}x{width}x3; "
            "give the shape that it makes"
        )
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
