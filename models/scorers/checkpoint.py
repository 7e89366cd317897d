"""Loading a scorer's checkpoint: all of its weights, and none of its code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import UserError
from models.placement import device_of, dtype_of, quiet
from models.weights import refuse_missing


@dataclass(frozen=True)
class ScorerRef:
    """Which model: picklable, and the key under which a process keeps it loaded. `path` is a local folder."""

    path: str
    dtype: str = "auto"  # bfloat16 on an accelerator, float32 on a CPU
    device: str = "auto"
    key: str = field(default="score.model", compare=False)  # of the spec, for errors


def load_model(ref: ScorerRef, automatic: Any, expected: str, **settings: Any) -> Any:
    """A model on its device, by transformers' class `automatic`, with `settings` in place of those of its config.

    `expected` says in an error what the folder should hold. Raises UserError where it holds no such model, pickles only, or
    lacks weights.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # weights of a part that is not loaded are worth no warning
    device = device_of(ref.device)
    with quiet():
        model, info = attempt(
            ref,
            expected,
            lambda: automatic.from_pretrained(
                ref.path,
                dtype=dtype_of(ref.dtype, device),
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **settings,
            ),
        )
    refuse_missing(info["missing_keys"], ref.key, ref.path)
    return model.to(device).eval()


def load_processor(ref: ScorerRef, automatic: Any, expected: str) -> Any:
    """What turns images or texts into a model's inputs. Raises UserError where the folder has no settings of it."""
    with quiet():
        return attempt(
            ref,
            expected,
            lambda: automatic.from_pretrained(ref.path, trust_remote_code=False, local_files_only=True),
        )


def attempt(ref: ScorerRef, expected: str, load: Callable[[], Any]) -> Any:
    """What `load` returns; a UserError that says what was expected where it raises."""
    import torch

    if not Path(ref.path).is_dir():
        raise UserError(f"{ref.key}: {ref.path} is no folder; give one with {expected}")
    try:
        return load()
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")[:200]
        raise UserError(
            f"{ref.key}: {ref.path} cannot be loaded ({type(error).__name__}: {said}); give a folder with {expected}, "
            "weights in safetensors"
        ) from error


def first_middle_last(frames: np.ndarray) -> np.ndarray:
    """The first, middle and last frame of clips [n, T, H, W, 3]: [n, min(T, 3), H, W, 3]. Open-Sora scores these."""
    total = frames.shape[1]
    return frames[:, sorted({0, total // 2, total - 1})]


def pixel_values(processor: Any, frames: np.ndarray, model: Any) -> Any:
    """Frames [m, H, W, 3] uint8 as the tensor that a model reads, on its device and in its precision."""
    made = processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return made.to(model.device, model.dtype)
