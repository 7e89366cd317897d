"""The families of generators: one table of what differs between their diffusers pipelines.

Each goes through its pipeline's own `__call__`, with embeddings in and latents out. Here latents always have one layout,
[n, channels, frames, height, width] for video and [n, channels, height, width] for images; a family packs them into what
its denoiser takes, and unpacks what comes back. Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from models.pack import pack_names

if TYPE_CHECKING:
    import torch

DENOISERS = ("transformer", "transformer_2")
"""Names of a pipeline's denoiser, or of its two experts."""
GUIDANCE = {
    "cfg": "u + w * (c - u)",
    "rescaled_cfg": "g = u + w * (c - u), then g * |c| / |g| at each token",
    "embedded": "w is an input of a guidance-distilled denoiser",
}
"""Conventions of `guidance_scale` w, for conditional prediction c and unconditional prediction u."""


@dataclass(frozen=True)
class Family:
    """What ditmill must know of one diffusers pipeline."""

    name: str
    pipeline: str
    media: Literal["video", "image"]
    embeds: tuple[str | None, ...]
    """Arguments of `__call__` that take what `encode_prompt` returns, in its order; None where there is none."""
    max_sequence_length: int | None
    """Longest text the denoiser was trained with; None where the encoder's length is fixed."""
    tokenizer: str | None
    """The tokenizer whose own limit also holds."""
    patch: int
    """Latent pixels to a side of a denoiser token."""
    guidance: Literal["cfg", "rescaled_cfg", "embedded"] = "cfg"
    packing: Literal["none", "frames_first", "image_tokens", "video_tokens"] = "none"
    fixed_length: bool = False
    """The denoiser knows one text length only; the plan's is not asked."""
    pads_text: bool = True
    """False: its encoder pads to the longest prompt in the batch, so each is encoded alone and padded here."""
    zero_pads: bool = False
    """What its encoder makes of padding is replaced by zeros, with no mask, so that it can be cut off and put back."""
    batches: bool = True
    """False: its pipeline takes one set of inputs a call, so samples are denoised one by one."""
    inputs: tuple[str, ...] = ()
    """Roles of the media a sample must bring."""
    sets_sigmas: bool = False
    """Its pipeline brings the sigmas; a scheduler must take them."""
    float32_vae: bool = False
    float32_latents: bool = True
    """False: its pipeline keeps latents in the denoiser's precision while it steps."""
    call: tuple[tuple[str, Any], ...] = ()
    """More arguments of `__call__`."""
    layouts: tuple[str, ...] = ()
    """Ways in which its denoiser can be laid out over ranks: names of `Degrees`."""
    accelerators: tuple[str, ...] = ()
    """Techniques of `models.accelerate.registry` that its denoiser and its pipeline can be given."""

    @property
    def layout(self) -> str:
        return "C T H W" if self.media == "video" else "C H W"

    def uses_negative(self, guidance_scale: float) -> bool:
        return self.guidance != "embedded" and guidance_scale > 1

    def guidance_arguments(self, guidance_scale: float) -> dict[str, float]:
        return {"true_cfg_scale" if self.guidance == "rescaled_cfg" else "guidance_scale": guidance_scale}

    def noise_dtype(self, denoiser: torch.dtype) -> torch.dtype:
        import torch

        return torch.float32 if self.float32_latents else denoiser

    def spatial_factor(self, pipe: Any) -> int:
        return int(_first(pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"))

    def temporal_factor(self, pipe: Any) -> int:
        return int(_first(pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio"))

    def latent_shape(self, pipe: Any, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Shape of one sample's latents, without the batch axis."""
        spatial = self.spatial_factor(pipe)
        channels = latent_channels(self, pipe)
        if self.media == "image":
            return (channels, height // spatial, width // spatial)
        frames = (num_frames - 1) // self.temporal_factor(pipe) + 1
        return (channels, frames + self.extra_frames(pipe, frames), height // spatial, width // spatial)

    def extra_frames(self, pipe: Any, frames: int) -> int:
        """Latent frames that come first and are cut before decoding, where tokens span several (CogVideoX 1.5)."""
        patch = pipe.transformer.config.get("patch_size_t") if self.packing == "frames_first" else None
        return -frames % patch if patch else 0

    def shape_error(self, pipe: Any, height: int, width: int, num_frames: int) -> str | None:
        """What is wrong with this media shape, or None."""
        multiple = self.spatial_factor(pipe) * self.patch
        if self.pipeline.startswith("Wan"):
            multiple = math.lcm(multiple, 16)
        elif self.pipeline == "LTXPipeline":
            multiple = math.lcm(multiple, 32)
        if height % multiple or width % multiple:
            return f"height and width must be multiples of {multiple} for {self.name}, found {height}x{width}"
        if self.media == "image":
            return None if num_frames == 1 else f"{self.name} makes images: num_frames must be 1, found {num_frames}"
        temporal = self.temporal_factor(pipe)
        if (num_frames - 1) % temporal:
            return f"num_frames must be {temporal}k+1 for {self.name}, found {num_frames}"
        return None

    def pack(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """[n, *latent_shape] as the pipeline's `latents` argument wants it."""
        if self.packing == "frames_first":
            return latents.transpose(1, 2).contiguous()
        if self.packing == "image_tokens":
            return pipe._pack_latents(latents, *latents.shape)
        if self.packing == "video_tokens":
            return pipe._pack_latents(
                latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
            )
        return latents

    def unpack(self, pipe: Any, latents: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """What the pipeline returns, as [n, *shape]."""
        if self.packing == "frames_first":
            latents = latents.transpose(1, 2)
        elif self.packing == "image_tokens":
            factor = pipe.vae_scale_factor
            latents = pipe._unpack_latents(latents, shape[-2] * factor, shape[-1] * factor, factor)
        elif self.packing == "video_tokens":
            spatial, temporal = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
            tokens = (shape[1] // temporal, shape[2] // spatial, shape[3] // spatial)
            latents = pipe._unpack_latents(latents, *tokens, spatial, temporal)
        return latents.reshape(latents.shape[0], *shape).contiguous()


def _first(pipe: Any, *names: str) -> Any:
    for name in names:
        if hasattr(pipe, name):
            return getattr(pipe, name)
    raise AttributeError(f"{type(pipe).__name__} has none of {', '.join(names)}")


def latent_channels(family: Family, pipe: Any) -> int:
    if family.inputs:  # the denoiser also takes the encoded inputs as channels
        return int(pipe.vae.config.z_dim)
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    if denoiser is None:
        denoiser = pipe.transformer_2
    channels = int(denoiser.config.in_channels)
    return channels // 4 if family.packing == "image_tokens" else channels


_PAIR = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
_ACCELERATORS = (
    *("first_block", "gated_taylor", "magcache", "taylorseer", "schedule"),
    *("guidance_rescale", "guidance_reuse", "guidance_interval"),
)
"""Those for a denoiser that has one list of blocks, and a pipeline that asks it for one branch after the other."""
_SANA = (("use_resolution_binning", False), ("negative_prompt", None))

FAMILIES: tuple[Family, ...] = (
    Family(
        "Wan text-to-video",
        "WanPipeline",
        "video",
        _PAIR,
        512,
        "tokenizer",
        patch=2,
        zero_pads=True,
        float32_vae=True,
        layouts=("cfg", "ulysses", "ring", "tensor", "dualparal", "vae"),
        accelerators=_ACCELERATORS,
    ),
    Family(
        "Wan image-to-video",
        "WanImageToVideoPipeline",
        "video",
        _PAIR,
        512,
        "tokenizer",
        patch=2,
        zero_pads=True,
        float32_vae=True,
        batches=False,
        inputs=("first_frame",),
        accelerators=_ACCELERATORS,
    ),
    Family(
        "LTX-Video",
        "LTXPipeline",
        "video",
        _MASKED,
        128,
        "tokenizer",
        patch=1,
        packing="video_tokens",
        sets_sigmas=True,
    ),
    Family(
        "HunyuanVideo",
        "HunyuanVideoPipeline",
        "video",
        ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
        256,
        None,
        patch=2,
        sets_sigmas=True,
        guidance="embedded",
    ),
    Family(
        "CogVideoX",
        "CogVideoXPipeline",
        "video",
        _PAIR,
        226,
        "tokenizer",
        patch=2,
        fixed_length=True,
        packing="frames_first",
        float32_latents=False,
    ),
    Family(
        "FLUX.1",
        "FluxPipeline",
        "image",
        ("prompt_embeds", "pooled_prompt_embeds", None),
        512,
        "tokenizer_2",
        patch=2,
        sets_sigmas=True,
        guidance="embedded",
        packing="image_tokens",
        float32_latents=False,
    ),
    Family(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        "image",
        _POOLED,
        256,
        "tokenizer_3",
        patch=2,
        float32_latents=False,
    ),
    Family(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        "image",
        _POOLED,
        None,
        None,
        patch=1,
        float32_vae=True,
        float32_latents=False,
    ),
    Family(
        "Sana",
        "SanaPipeline",
        "image",
        _MASKED,
        300,
        None,
        patch=1,
        call=(("use_resolution_binning", False), ("negative_prompt", None)),
    ),
    Family(
        "Qwen-Image",
        "QwenImagePipeline",
        "image",
        ("prompt_embeds", "prompt_embeds_mask"),
        512,
        None,
        patch=2,
        sets_sigmas=True,
        guidance="rescaled_cfg",
        packing="image_tokens",
        pads_text=False,
        float32_latents=False,
    ),
)


def family_of(pipeline: str) -> Family | None:
    """The family of a pipeline class name; None means that it runs whole."""
    return next((family for family in FAMILIES if family.pipeline == pipeline), None)


def table() -> list[dict[str, Any]]:
    """What can be loaded, one row a family, for `ditmill models`; the last row is every other pipeline."""
    packs = [f"pack://{name}" for name in pack_names()]
    rows = [
        {
            "family": family.name,
            "pipeline": family.pipeline,
            "media": family.media,
            "inputs": list(family.inputs),
            "trajectories": "yes",
            "parallel": list(family.layouts),
            "accelerators": list(family.accelerators),
            "packs": packs if family.pipeline == "WanPipeline" else [],
        }
        for family in FAMILIES
    ]
    other = {"family": "any other diffusers pipeline, run whole", "pipeline": "*", "media": "as it makes", "inputs": []}
    return [*rows, {**other, "trajectories": "no", "parallel": [], "accelerators": [], "packs": []}]
