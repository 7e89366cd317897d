"""Whether a checkpoint held all the weights of its models.

Loaders forgive a file that lacks some: transformers puts random numbers in their place without an error, diffusers leaves
them on torch's meta device. Either would make samples of nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError

if TYPE_CHECKING:
    import torch

SHOWN = 3


def refuse_missing(names: Iterable[str], key: str, path: str) -> None:
    """UserError if any weight is missing. `key` is the spec's, `path` the model's folder."""
    missing = sorted(names)
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        raise UserError(
            f"{key}: {path} lacks weights of its own model, {len(missing)} missing ({shown}); fetch it again"
        )


def text_models(path: str, components: dict[str, Any], skipped: set[str], dtype: torch.dtype) -> dict[str, Any]:
    """The models of transformers among a pipeline's components, each loaded whole.

    diffusers would load them just so, but not tell what was missing. `components` is model_index.json.
    """
    import transformers

    found = {}
    for name, value in components.items():
        if not isinstance(value, list) or value[0] != "transformers" or name in skipped:
            continue
        made_by: Any = getattr(transformers, str(value[1]), None)
        is_model = isinstance(made_by, type) and issubclass(made_by, transformers.PreTrainedModel)
        if is_model:
            folder = str(Path(path, name))
            found[name], info = made_by.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            refuse_missing(info["missing_keys"], "generators.model", folder)
    return found


def refuse_meta(pipe: Any, path: str) -> None:
    """UserError if weights of any of a pipeline's models were never filled."""
    import torch

    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            empty = (weight for weight, value in module.state_dict().items() if value.is_meta)
            refuse_missing(empty, "generators.model", str(Path(path, name)))
