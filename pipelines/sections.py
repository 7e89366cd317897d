"""Sections of the spec: what a user writes, as pydantic models. Every key is documented here and nowhere else."""

from __future__ import annotations

import json
import re
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

DEFAULT_PACK = "pack://shapes"
PACK_GUIDANCE = 1.75
"""The guidance_scale at which its samples are right most often."""


class Section(BaseModel):
    """Keys that belong together. A key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _fits_64_bits(cls, value: Any) -> Any:
        """Tables and tensors count in 64 bits."""
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"expected a whole number of 64 bits, found {number}")
        return value


def _yes_no(value: Any) -> Any:
    """YAML reads a bare yes or no as true or false."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def _iso(value: Any) -> Any:
    """YAML reads a bare ISO 8601 time as a time."""
    return value.isoformat() if isinstance(value, (datetime, date)) else value


class Adapter(Section):
    """A LoRA adapter that a generator carries."""

    uri: str = Field(description="Safetensors file or folder: a local path, an fsspec URL or a hub id.")
    weight: float = Field(1.0, description="Scale of the adapter.")


class Generator(Section):
    """A text encoder, a denoiser and a decoder in the diffusers checkpoint format."""

    model: str = Field(DEFAULT_PACK, description="pack://NAME, a local folder, an fsspec URL or a hub id.")
    revision: str | None = Field(None, description="Hub revision; needed where remote code is allowed.")
    remote_code: str | None = Field(
        None,
        description="Hub repository whose pipeline code may run; needs `revision`. No other remote code ever runs.",
    )
    adapters: tuple[Adapter, ...] = Field((), description="LoRA adapters, applied in order.")
    teacher_steps: int = Field(
        0,
        ge=0,
        description="First steps taken by the base model before `model`, its student, takes over without guidance"
        " (arXiv 2503.10637); Wan text-to-video.",
    )
    teacher: str | None = Field(
        None, description="The base model, named as `model` is; left out, what the student's ditmill.json says."
    )
    teacher_guidance_scale: float | None = Field(
        None,
        ge=0,
        description="guidance_scale of the base model's steps, 1 for none; left out, what ditmill.json says.",
    )
    licence: str | None = Field(None, description="SPDX id or name, where the checkpoint does not say.")
    may_train: Annotated[Literal["yes", "no", "unknown"] | None, BeforeValidator(_yes_no)] = Field(
        None, description="May its outputs train other models? Overrides what the table of licences says."
    )

    @model_validator(mode="after")
    def _pinned(self) -> Generator:
        if self.remote_code and not self.revision:
            raise ValueError("remote_code needs a revision: name the commit whose code you have read")
        return self


class Expand(Section):
    """How one prompt record becomes several prompts."""

    model: str = Field(DEFAULT_PACK, description="A causal language model with a chat template.")
    revision: str | None = Field(None, description="Hub revision.")
    variants: int = Field(2, ge=1, description="Prompts made from each record.")
    temperature: float = Field(
        0.8, ge=0, description="Sampling temperature; 0 is greedy. top_k, top_p and min_p are the checkpoint's own."
    )
    max_new_tokens: int = Field(96, ge=1, description="Longest expansion, in tokens.")
    instruction: str = Field(
        "Rewrite this prompt for a video model: keep all that it says, add detail on look and motion. Prompt: {prompt}",
        description="What the model is asked; {prompt} is the record's prompt.",
    )
    keep_original: bool = Field(False, description="Keep the record's own prompt as one more variant.")

    @field_validator("instruction")
    @classmethod
    def _names_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("must contain {prompt}")
        return value


class Prompts(Section):
    """Where prompt records come from."""

    path: str | None = Field(
        None, description="Text (a prompt a line), JSONL, CSV or Parquet: a path or an fsspec URL."
    )
    inline: tuple[str | dict[str, Any], ...] = Field(
        (), description="Records written here: texts, or objects with a record's fields."
    )
    column: str = Field("prompt", description="Column that holds the prompt.")
    exclude: tuple[str, ...] = Field(
        (), description="Files of prompts to keep out (benchmarks), exact and near matches."
    )
    near_duplicates: Literal["report", "drop", "ignore"] = Field(
        "report", description="What becomes of near-duplicate prompts."
    )
    near_threshold: float = Field(
        0.85, gt=0, le=1, description="Jaccard similarity of word 3-shingles that counts as near."
    )
    expand: Expand | None = Field(
        None, description="Expansion by a language model; left out, prompts are used as they are."
    )

    @field_validator("inline")
    @classmethod
    def _is_unicode(cls, value: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        for at, item in enumerate(value):
            try:
                json.dumps(item, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError:
                raise ValueError(f"expected Unicode text, found some in record {at} that UTF-8 cannot hold") from None
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Prompts:
        if self.path is not None and self.inline:
            raise ValueError("give exactly one of prompts.path and prompts.inline")
        return self


class Bucket(Section):
    """A media shape; one frame makes images."""

    height: int = Field(64, ge=8, description="Pixels.")
    width: int = Field(64, ge=8, description="Pixels.")
    num_frames: int = Field(17, ge=1, description="Frames; 4k+1 for Wan's VAE, 1 for images.")
    fps: float = Field(8.0, gt=0, description="Frames a second of the written video.")
    weight: float = Field(1.0, gt=0, description="Share of prompts drawn into this bucket, by a hash of the prompt.")

    @model_validator(mode="after")
    def _even_video(self) -> Bucket:
        if self.num_frames > 1 and (self.height % 2 or self.width % 2):
            raise ValueError(f"video needs an even height and width (yuv420p), found {self.height}x{self.width}")
        return self


class Parallel(Section):
    """Degrees of the parallel layout; together they make the sampler group's size."""

    cfg: int = Field(1, ge=1, description="Guidance branches on separate ranks.")
    ulysses: int = Field(1, ge=1, description="Ulysses degree.")
    ring: int = Field(1, ge=1, description="Ring degree.")
    tensor: int = Field(1, ge=1, description="Tensor-parallel degree.")
    dualparal: int = Field(1, ge=1, description="DualParal pipeline degree.")
    vae: int = Field(1, ge=1, description="Ranks that decode tiles: 1, or all of the group.")


class Layout(Section):
    """What is not meant to change the result."""

    batch_size: int = Field(16, ge=1, description="Samples denoised together; batches are padded to it.")
    threads: int = Field(
        1, ge=1, description="torch threads of each worker; a setting, because it changes the last bits."
    )
    parallel: Parallel = Field(Parallel(), description="Parallel degrees.")
    offload: Literal["none", "model", "sequential"] = Field(
        "none", description="diffusers' CPU offload, on an accelerator."
    )
    compile: bool = Field(False, description="torch.compile the denoiser, on an accelerator.")
    attention: Literal["native", "flash", "flash_3", "flash_4", "cudnn"] = Field(
        "native", description="Kernel of self-attention: torch's own, or one of xfuser's, on a GPU; Wan text-to-video."
    )
    vae_tiling: bool = Field(False, description="Decode in tiles.")
    max_cache_bytes: int = Field(
        8 * 1024**3,
        ge=0,
        description="Most that techniques of sampler.accelerate may keep at a time, on each device; a batch that wants more"
        " ends the run.",
    )

    @model_validator(mode="after")
    def _tiles_are_shared(self) -> Layout:
        if self.parallel.vae > 1 and not self.vae_tiling:
            raise ValueError(f"parallel.vae: {self.parallel.vae} ranks share tiles, and vae_tiling is off; turn it on")
        return self


class Score(Section):
    """ScoreMedia: what needs no model. A bound that is left out rejects nothing."""

    min_sharpness: float | None = Field(
        None, description="Variance of the Laplacian of luma (0-255), mean over frames."
    )
    min_motion: float | None = Field(None, description="Mean optical-flow magnitude (Farneback), pixels a frame.")
    max_motion: float | None = Field(None, description="The same, from above.")
    max_flicker: float | None = Field(None, description="Mean absolute second difference of mean luma, 0-255.")
    min_brightness: float | None = Field(None, description="Mean luma, 0-255.")
    max_brightness: float | None = Field(None, description="The same, from above.")
    reject_static: bool = Field(True, description="Reject videos in which no frame differs from the first.")
    reject_duplicates: bool = Field(
        True, description="Reject media whose perceptual hash was seen before in the same batch."
    )
    duplicate_distance: int = Field(
        0, ge=0, le=64, description="Hamming distance of 64-bit perceptual hashes that is still a duplicate."
    )


class Target(Section):
    """When a run has enough."""

    samples: int | None = Field(None, ge=1, description="Samples in the dataset, of any verdict, failures included.")
    accepted: int | None = Field(None, ge=1, description="Accepted samples in the dataset.")


class Budget(Section):
    """When a run must stop."""

    accelerator_seconds: float | None = Field(
        None, gt=0, description="Allocated accelerator-seconds, with load and idle."
    )
    bytes: int | None = Field(None, gt=0, description="Bytes written under the dataset's root by this run.")
    deadline: Annotated[str | None, BeforeValidator(_iso)] = Field(
        None, description="ISO 8601 time, or a duration such as 90m (also s, h, d)."
    )

    @field_validator("deadline")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(\.\d+)?[smhd]", value):
            try:
                datetime.fromisoformat(value)
            except ValueError:
                raise ValueError("expected an ISO 8601 time, or a duration such as 90m") from None
        return value


class Storage(Section):
    """How to reach S3. Credentials are never in a spec: they come from the environment, a profile or the machine's role."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; left out, the provider's own.")
    region: str | None = Field(None, description="S3 region.")
    allow_http: bool = Field(False, description="Allow an endpoint without TLS.")
    path_style: bool | None = Field(
        None, description="Put the bucket in the path, not in the host's name; left out, where endpoint_url is given."
    )
    profile: str | None = Field(
        None, description="Named AWS profile that credentials and region come from; every node needs it."
    )
    server_side_encryption: Literal["AES256", "aws:kms"] | None = Field(
        None, description="Encryption asked for each object; left out, the bucket's own."
    )
    kms_key_id: str | None = Field(None, description="Key of aws:kms; left out, the account's own for S3.")
    timeout: float = Field(20, gt=0, description="Seconds without an answer until a request is given up and repeated.")

    @model_validator(mode="after")
    def _consistent(self) -> Storage:
        if self.kms_key_id and self.server_side_encryption != "aws:kms":
            raise ValueError("kms_key_id needs server_side_encryption: aws:kms")
        if (self.endpoint_url or "").startswith("http://") and not self.allow_http:
            raise ValueError("endpoint_url has no TLS; use https://, or set allow_http: true")
        return self


Dtype = Literal["float32", "float16", "bfloat16"]
Tensor = Literal["latents", "noise", "text_embeddings"]


def _states(value: Any) -> Any:
    if value == "all" or (isinstance(value, (list, tuple)) and all(type(index) is int for index in value)):
        return value
    raise ValueError(f"expected all, or a list of whole numbers, found {value!r}")


class Trajectory(Section):
    """Which states of the teacher's path are kept: recipe trajectory."""

    keep: Annotated[Literal["all"] | tuple[int, ...], BeforeValidator(_states)] = Field(
        description="all, or their indices, negative ones from the end: [0, 12, 24, 36, -1]."
    )
    convention: Literal["before", "after"] = Field(
        "before",
        description="What an index names: before, what step k starts from, 0 the noise, N+1 states of N steps; after, what"
        " step k made, N states without the noise.",
    )
    dtype: Dtype = Field("float16", description="Of the stored states.")


class Output(Section):
    """Where the dataset lands."""

    uri: str = Field("out/dataset", description="Folder or fsspec URL of the dataset's root.")
    commit_every: float = Field(60, gt=0, description="Seconds between commits; a run also commits when it ends.")
    keep_rejected: Literal["preview", "latents", "media", "none"] = Field(
        "preview", description="What is kept of rejected samples, so that they can be seen and judged again."
    )
    image_format: Literal["webp", "png"] = Field("png", description="Format of single-frame samples.")
    crf: int = Field(18, ge=0, le=51, description="x264 quality; lower is better and larger.")
    marked: bool = Field(
        True, description="Say in each media file's XMP that a model made it (IPTC DigitalSourceType)."
    )
    tensors: dict[Tensor, Dtype] = Field(
        {},
        description="Tensors that are kept, with their dtype: latents and noise of accepted samples, text_embeddings once for"
        " each distinct text. Left out, what the recipe is for (see docs/distillation.md).",
    )
    compression: Literal["none", "zstd"] = Field(
        "none",
        description="Of tensors. zstd takes 5% off float16 latents, 8% off float32, 18% off bfloat16 (the pack's), and other"
        " tools then have to decompress a member before they read it as safetensors.",
    )
    storage: Storage = Field(Storage(), description="Object storage.")
