"""Loading a diffusers checkpoint, whole or the part that a stage computes with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from infra.errors import UserError
from models.families import Family
from models.parallel.degrees import Attention, Degrees
from models.placement import device_of, dtype_of
from models.weights import refuse_meta, text_models

Part = Literal["encode", "sample", "decode"]

_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
_DENOISER = ("transformer", "transformer_2", "unet")
_WITHOUT: dict[Part, tuple[str, ...]] = {
    "encode": (*_DENOISER, "vae", "image_encoder"),
    "sample": _TEXT,
    "decode": (*_TEXT, *_DENOISER, "image_encoder"),
}
"""Components that a part leaves on disk."""


@dataclass(frozen=True)
class TeacherRef:
    """The base model that takes the first `steps` steps of a sample before its student, see `models.hand_off`.

    `path` is a local folder; `model`, its name in the spec, and `sha256`, of its content, go into rows. At a
    `guidance_scale` of at most 1 it is not guided.
    """

    path: str
    model: str
    sha256: str
    steps: int
    guidance_scale: float

    def facts(self) -> dict[str, Any]:
        """All but where it lies, for `plan_json`."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


@dataclass(frozen=True)
class GeneratorRef:
    """What to load and how. `path` is a local folder, see `models.source.resolve`; adapters are (path, weight)."""

    path: str
    adapters: tuple[tuple[str, float], ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    offload: Literal["none", "model", "sequential"] = "none"
    compile: bool = False
    vae_tiling: bool = False
    remote_code: str | None = None
    revision: str | None = None
    parallel: Degrees = field(default_factory=Degrees)
    """More than one rank: each is a process of one torch.distributed group, and all make the same calls."""
    attention: Attention = "native"
    teacher: TeacherRef | None = None
    max_cache_bytes: int | None = None
    """Most that techniques of a plan may keep at a time, on each rank; None for no bound."""


def read_index(path: str) -> dict[str, Any]:
    """The checkpoint's model_index.json: its pipeline class and components."""
    try:
        index = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"generators.model: {path}: model_index.json cannot be read ({error})") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UserError(f"generators.model: {path}: model_index.json names no pipeline of diffusers (_class_name)")
    return index


def load_pipeline(ref: GeneratorRef, family: Family | None, part: Part) -> Any:
    """A diffusers pipeline on its device. A family's holds what `part` needs; any other is loaded whole."""
    import diffusers
    import torch

    be_quiet()
    device = device_of(ref.device)
    dtype = dtype_of(ref.dtype, device)
    arguments: dict[str, Any] = {"use_safetensors": True, "dtype": dtype}
    components = read_index(ref.path)
    if family is not None:
        arguments |= dict.fromkeys(_left_out(ref, components, part))
        if family.float32_vae and "vae" not in arguments:
            arguments["dtype"] = {"default": dtype, "vae": torch.float32}
    _refuse_code(ref, components)
    if ref.remote_code:
        arguments |= {"custom_pipeline": ref.remote_code, "custom_revision": ref.revision, "trust_remote_code": True}
    try:
        arguments |= text_models(ref.path, components, set(arguments), dtype)
        # By its own class: diffusers' generic one does not let go of components that a pipeline calls optional.
        pipeline = getattr(diffusers, family.pipeline) if family is not None else diffusers.DiffusionPipeline
        pipe = pipeline.from_pretrained(ref.path, **arguments)
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"generators.model: {ref.path} cannot be loaded ({_first_line(error)}); give a whole checkpoint in the format of"
            " diffusers"
        ) from error
    refuse_meta(pipe, ref.path)
    _add_adapters(pipe, ref)
    pipe.set_progress_bar_config(disable=True)
    _place(pipe, ref, device)
    return pipe


def _refuse_code(ref: GeneratorRef, components: dict[str, Any]) -> None:
    """What may run is the repository that the spec names; it is no leave for code that lies in the checkpoint."""
    libraries = {name: value[0] for name, value in components.items() if isinstance(value, list) and value}
    files = [f"{name}/{library}.py" for name, library in libraries.items()] + [f"{ref.remote_code}.py"]
    for file in files:
        if Path(ref.path, file).exists():
            raise UserError(
                f"generators.model: {ref.path}: {file} is code, and only that of generators.remote_code may run; "
                "give a checkpoint without it"
            )


def _left_out(ref: GeneratorRef, components: dict[str, Any], part: Part) -> list[str]:
    if ref.adapters:  # an adapter may reach the text encoder too
        return []
    no_t5 = "text_encoder_3" in components and components["text_encoder_3"][0] is None
    if part == "encode" and no_t5:  # Stable Diffusion 3 then asks its denoiser how wide the zeros should be
        return []
    return [name for name in (*_WITHOUT[part], *loaded_by_ranks(ref)) if name in components]


def loaded_by_ranks(ref: GeneratorRef) -> dict[str, Path]:
    """Folders of the denoisers of which each rank of tensor parallel loads its own part, by name.

    With an adapter, which changes whole weights, each loads them whole; so does a process that is no rank.
    """
    from torch.distributed import is_initialized

    if ref.parallel.tensor == 1 or ref.adapters or not is_initialized():
        return {}
    return {path.parent.name: path.parent for path in sorted(Path(ref.path).glob("transformer*/config.json"))}


def denoiser_of(pipe: Any) -> Any:
    """The network that is evaluated at each step; of two, the first that is there."""
    found = (getattr(pipe, name, None) for name in _DENOISER)
    denoiser = next((module for module in found if module is not None), None)
    if denoiser is None:
        raise UserError(f"generators.model: {type(pipe).__name__} has none of {', '.join(_DENOISER)}")
    return denoiser


def _add_adapters(pipe: Any, ref: GeneratorRef) -> None:
    names = []
    for number, (path, _) in enumerate(ref.adapters):
        file = Path(path)
        where = {"weight_name": file.name} if file.is_file() else {}
        try:
            pipe.load_lora_weights(
                str(file.parent if file.is_file() else file),
                adapter_name=f"adapter_{number}",
                use_safetensors=True,
                **where,
            )
        except Exception as error:
            raise UserError(f"generators.adapters: {path} does not fit {ref.path} ({_first_line(error)})") from error
        names.append(f"adapter_{number}")
    if names:
        pipe.set_adapters(names, [weight for _, weight in ref.adapters])


def _place(pipe: Any, ref: GeneratorRef, device: str) -> None:
    if ref.vae_tiling and getattr(pipe, "vae", None) is not None and hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    if device == "cpu":
        pipe.to(device)
        return
    if ref.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif ref.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    if ref.compile:
        for name in _DENOISER:
            if (module := getattr(pipe, name, None)) is not None:
                module.compile()


def be_quiet() -> None:
    """Errors only, no progress bars: a worker's output is a log, and diffusers warns of each prompt that it cuts."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
