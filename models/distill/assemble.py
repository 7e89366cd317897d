"""The result: the teacher's checkpoint with a new denoiser and a scheduler that steps as the student was trained to.

An ordinary folder of diffusers, of the teacher's files otherwise; weights have the types that they have there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from models.loading import be_quiet, read_index

SUPPORTED = "WanPipeline"


def check_teacher(path: str) -> None:
    """UserError with the reason where this checkpoint cannot have a student."""
    index = read_index(path)
    pipeline = index["_class_name"]
    if pipeline != SUPPORTED:
        raise UserError(
            f"teacher: {path} is a {pipeline}; students are trained of {SUPPORTED} (Wan text-to-video): other families take"
            " conditions that a dataset's embeddings do not hold all of"
        )
    if index.get("expand_timesteps") or (index.get("transformer_2") or [None, None])[1] is not None:
        raise UserError(
            f"teacher: {path} is a Wan 2.2 with two denoisers or a timestep for each token; only one denoiser is trained"
        )


def latent_shape(path: str, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """Channels, frames, height and width of the teacher's latents of media of this shape."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    channels = WanTransformer3DModel.load_config(path, subfolder="transformer")["in_channels"]
    vae = AutoencoderKLWan.load_config(path, subfolder="vae")
    temporal, spatial = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    return channels, (num_frames - 1) // temporal + 1, height // spatial, width // spatial


def load_transformer(path: str, *, gradient_checkpointing: bool = False) -> Any:
    """The teacher's denoiser in float32, to begin with."""
    from diffusers import WanTransformer3DModel

    be_quiet()
    model = WanTransformer3DModel.from_pretrained(
        path, subfolder="transformer", torch_dtype=torch.float32, use_safetensors=True
    )
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def load_scheduler(path: str) -> Any:
    """The teacher's scheduler."""
    import diffusers

    kind = read_index(path)["scheduler"][1]
    return getattr(diffusers, kind).from_pretrained(path, subfolder="scheduler")


def write_student(
    teacher: str, folder: Path, weights: Mapping[str, torch.Tensor], scheduler: Any, facts: Mapping[str, Any], card: str
) -> None:
    """Write the checkpoint into `folder`, beside what else lies there. model_index.json comes last: without it there is none.

    `weights` are float32 by the names of the transformer's parameters; `facts` become ditmill.json.
    """
    index = Path(folder, "model_index.json")
    index.unlink(missing_ok=True)
    kept = {name for name, value in read_index(teacher).items() if isinstance(value, list) and value[0] is not None}
    for name in sorted(kept - {"transformer", "scheduler"}):
        if Path(teacher, name).is_dir():
            shutil.copytree(Path(teacher, name), folder / name, dirs_exist_ok=True)
    _write_transformer(teacher, folder / "transformer", weights)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "ditmill.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    said = read_index(teacher) | {"scheduler": ["diffusers", type(scheduler).__name__]}
    index.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _write_transformer(teacher: str, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    from diffusers import WanTransformer3DModel

    shutil.rmtree(folder, ignore_errors=True)
    types = stored_types(Path(teacher, "transformer"))
    config = WanTransformer3DModel.load_config(teacher, subfolder="transformer")
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    state = {name: value.to(types.get(name, value.dtype)) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise RuntimeError(f"{folder}: missing {missing}, unexpected {unexpected}")
    model.register_to_config(_name_or_path="")  # a folder of this machine
    model.save_pretrained(folder, safe_serialization=True)


def stored_types(folder: Path) -> dict[str, torch.dtype]:
    """The type on disk of each weight of a folder's safetensors."""
    from safetensors import safe_open

    found: dict[str, torch.dtype] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    return found
