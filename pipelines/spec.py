"""The spec: what a user writes, as pydantic models. Unknown keys are errors; every field is documented here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from infra.errors import UserError

DEFAULT_PACK = "pack://tiny"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Adapter(_Section):
    """A LoRA adapter that a generator carries."""

    uri: str = Field(description="Safetensors file or folder: a local path, an fsspec URL or a hub id.")
    weight: float = Field(1.0, description="Scale of the adapter.")


class Generator(_Section):
    """A text encoder, a denoiser and a decoder in the diffusers checkpoint format."""

    model: str = Field(DEFAULT_PACK, description="pack://NAME, a local folder, an fsspec URL or a hub id.")
    revision: str | None = Field(None, description="Hub revision; needed where remote code is allowed.")
    remote_code: str | None = Field(
        None, description="Hub repository whose custom pipeline code may run; needs `revision`. No other remote code ever runs."
    )
    adapters: tuple[Adapter, ...] = Field((), description="LoRA adapters, applied in order.")
    teacher_steps: int = Field(0, ge=0, description="First steps taken by the base model before its student takes over.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the denoiser; auto is bfloat16 on an accelerator and float32 on a CPU."
    )
    licence: str | None = Field(None, description="SPDX id or name, where the checkpoint does not say.")
    may_train: Literal["yes", "no", "unknown"] | None = Field(
        None, description="May its outputs train other models? Overrides what the table of licences says."
    )

    @model_validator(mode="after")
    def _pinned(self) -> Generator:
        if self.remote_code and not self.revision:
            raise ValueError("remote_code needs a revision: name the commit whose code you have read")
        return self


class Expand(_Section):
    """How one prompt record becomes several prompts."""

    model: str = Field(DEFAULT_PACK, description="A causal language model with a chat template.")
    revision: str | None = Field(None, description="Hub revision.")
    variants: int = Field(2, ge=1, description="Prompts made from each record.")
    temperature: float = Field(0.8, ge=0, description="Sampling temperature; 0 is greedy.")
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


class Prompts(_Section):
    """Where prompt records come from."""

    path: str | None = Field(None, description="Text (a prompt a line), JSONL, CSV or Parquet: a path or an fsspec URL.")
    inline: tuple[str | dict[str, Any], ...] = Field((), description="Records written here: texts or objects with record fields.")
    column: str = Field("prompt", description="Column that holds the prompt.")
    exclude: tuple[str, ...] = Field((), description="Files of prompts to keep out (benchmarks), exact and near matches.")
    near_duplicates: Literal["report", "drop", "ignore"] = Field("report", description="What becomes of near-duplicate prompts.")
    near_threshold: float = Field(0.85, gt=0, le=1, description="Jaccard similarity of word 3-shingles that counts as near.")
    expand: Expand | None = Field(None, description="Expansion by a language model; left out, prompts are used as they are.")

    @model_validator(mode="after")
    def _one_source(self) -> Prompts:
        if (self.path is None) == (not self.inline):
            raise ValueError("give exactly one of prompts.path and prompts.inline")
        return self


class Bucket(_Section):
    """A media shape; one frame makes images."""

    height: int = Field(64, ge=8, description="Pixels.")
    width: int = Field(64, ge=8, description="Pixels.")
    num_frames: int = Field(17, ge=1, description="Frames; 4k+1 for Wan's VAE, 1 for images.")
    fps: float = Field(8.0, gt=0, description="Frames a second of the written video.")
    weight: float = Field(1.0, gt=0, description="Share of prompts drawn into this bucket, by a hash of the prompt.")


class Sampler(_Section):
    """The sampler plan: what is meant to change the result."""

    plan: str | None = Field(None, description="`auto`, or a plan file made by `ditmill tune`; its keys replace those below.")
    scheduler: Literal["default", "unipc", "euler", "flow_match_euler", "dpmpp", "ddim"] = Field(
        "default", description="default is the checkpoint's own."
    )
    num_inference_steps: int = Field(20, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(5.0, ge=0, description="Classifier-free guidance; 1 turns it off.")
    shift: float | None = Field(None, description="Flow shift; left out, the checkpoint's own.")
    max_sequence_length: int = Field(512, ge=1, description="Tokens that a prompt is padded or cut to, where the family asks.")
    accelerate: tuple[dict[str, Any], ...] = Field((), description="Techniques that skip work, in order. None is built in yet.")
    early_reject: dict[str, Any] | None = Field(None, description="Stop samples that will be rejected. Not built in yet.")

    @model_validator(mode="after")
    def _not_yet(self) -> Sampler:
        if self.plan or self.accelerate or self.early_reject:
            raise ValueError("plan, accelerate and early_reject are not available in this version; remove them")
        return self


class Parallel(_Section):
    """Degrees of the parallel layout; together they make the sampler group's size."""

    cfg: int = Field(1, ge=1, description="Guidance branches on separate ranks.")
    ulysses: int = Field(1, ge=1, description="Ulysses degree.")
    ring: int = Field(1, ge=1, description="Ring degree.")
    tensor: int = Field(1, ge=1, description="Tensor-parallel degree.")
    dualparal: int = Field(1, ge=1, description="DualParal pipeline degree.")
    vae: int = Field(1, ge=1, description="VAE-parallel degree.")

    @model_validator(mode="after")
    def _not_yet(self) -> Parallel:
        found = {name: degree for name, degree in self if degree != 1}
        if found:
            raise ValueError(f"degrees other than 1 are not available in this version, found {found}; remove them")
        return self


class Layout(_Section):
    """What is not meant to change the result."""

    batch_size: int = Field(16, ge=1, description="Samples denoised together; batches are padded to it.")
    threads: int = Field(1, ge=1, description="torch threads of each worker; a setting, because it changes the last bits.")
    parallel: Parallel = Field(Parallel(), description="Parallel degrees.")
    offload: Literal["none", "model", "sequential"] = Field("none", description="diffusers' CPU offload, on an accelerator.")
    compile: bool = Field(False, description="torch.compile the denoiser, on an accelerator.")
    vae_tiling: bool = Field(False, description="Decode in tiles.")


class Score(_Section):
    """ScoreMedia: what needs no model. A bound that is left out rejects nothing."""

    min_sharpness: float | None = Field(None, description="Variance of the Laplacian of luma (0-255), mean over frames.")
    min_motion: float | None = Field(None, description="Mean optical-flow magnitude (Farneback), pixels a frame.")
    max_motion: float | None = Field(None, description="The same, from above.")
    max_flicker: float | None = Field(None, description="Mean absolute second difference of mean luma, 0-255.")
    min_brightness: float | None = Field(None, description="Mean luma, 0-255.")
    max_brightness: float | None = Field(None, description="The same, from above.")
    reject_static: bool = Field(True, description="Reject videos in which no frame differs from the first.")
    reject_duplicates: bool = Field(True, description="Reject media whose perceptual hash was seen before in the same batch.")
    duplicate_distance: int = Field(0, ge=0, le=64, description="Hamming distance of 64-bit perceptual hashes that is still a duplicate.")


class Judge(_Section):
    """The model that scores, and the bar."""

    backend: Literal["transformers", "call", "none"] = Field(
        "transformers", description="transformers in process; call: your own code; none: all that ScoreMedia leaves is accepted."
    )
    model: str = Field(DEFAULT_PACK, description="A multimodal model in transformers' checkpoint format.")
    revision: str | None = Field(None, description="Hub revision.")
    call: str | None = Field(None, description="module:function for backend `call`; takes a batch, returns {question: [n] floats}.")
    version: str | None = Field(None, description="Version of that code, recorded with each score.")
    rubric: str = Field("default", description="`default` or a YAML file of questions.")
    thresholds: dict[str, float] = Field({}, description="Least P(yes) for each question; replaces the rubric's own.")
    num_frames: int = Field(8, ge=1, description="Frames shown to the model, evenly spaced.")

    @model_validator(mode="after")
    def _call_is_named(self) -> Judge:
        if self.backend == "call" and not (self.call and self.version):
            raise ValueError("backend `call` needs call: 'module:function' and a version")
        return self


class Caption(_Section):
    """The model that captions what was accepted."""

    model: str = Field(DEFAULT_PACK, description="A multimodal model; the judge's own is loaded once for both.")
    revision: str | None = Field(None, description="Hub revision.")
    styles: tuple[Literal["short", "dense"], ...] = Field(("short", "dense"), description="Captions to write; the first is the sample's.")
    max_new_tokens: int = Field(96, ge=1, description="Longest caption, in tokens.")
    num_frames: int = Field(8, ge=1, description="Frames shown to the model.")


class Target(_Section):
    """When a run has enough."""

    samples: int | None = Field(None, ge=1, description="Samples in the dataset, of any verdict, failures included.")
    accepted: int | None = Field(None, ge=1, description="Accepted samples in the dataset.")


class Budget(_Section):
    """When a run must stop."""

    accelerator_seconds: float | None = Field(None, gt=0, description="Allocated accelerator-seconds, load and idle included.")
    bytes: int | None = Field(None, gt=0, description="Bytes written under the dataset's root by this run.")
    deadline: str | None = Field(None, description="ISO 8601 time, or a duration such as 90m.")


class Policy(_Section):
    """What is allowed."""

    licences: Literal["warn", "refuse", "ignore"] = Field(
        "warn", description="What to do when a model's licence may not let its outputs train others."
    )


class Storage(_Section):
    """How to reach object storage; credentials come from the environment only."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; left out, the provider's own.")
    region: str | None = Field(None, description="S3 region.")
    allow_http: bool = Field(False, description="Allow an endpoint without TLS.")


class Output(_Section):
    """Where the dataset lands."""

    uri: str = Field("out/dataset", description="Folder or fsspec URL of the dataset's root.")
    commit_every: float = Field(60, gt=0, description="Seconds between commits; a run also commits when it ends.")
    keep_rejected: Literal["preview", "latents", "media", "none"] = Field(
        "preview", description="What is kept of rejected samples, so that they can be seen and judged again."
    )
    image_format: Literal["webp", "png"] = Field("png", description="Format of single-frame samples.")
    crf: int = Field(18, ge=0, le=51, description="x264 quality; lower is better and larger.")
    tensors: dict[Literal["latents"], Literal["float32", "float16", "bfloat16"]] = Field(
        {}, description="Tensors kept beside accepted media, with their dtype."
    )
    storage: Storage = Field(Storage(), description="Object storage.")


class Compute(_Section):
    """What a run may use."""

    ray_address: str | None = Field(None, description="Address of a running Ray cluster; left out, one is started here.")
    limits: dict[Literal["cpus", "gpus"], float] = Field({}, description="Most CPUs and GPUs that this run takes.")
    actors: dict[Literal["sample", "judge"], int] = Field({}, description="Actors of a stage group; left out, as many as fit.")
    split: Literal["auto", "shared", "stages"] = Field(
        "auto", description="shared: few actors hold several stages (small machines); stages: each model has actors of its own."
    )


class Spec(_Section):
    """One dataset."""

    name: str = Field("dataset", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the dataset.")
    recipe: Literal["synthetic"] = Field("synthetic", description="Kind of dataset.")
    seed: int = Field(0, ge=0, lt=2**63, description="Enters the noise of every sample that gives none itself.")
    prompts: Prompts
    samples_per_prompt: int = Field(1, ge=1, description="Samples of each prompt, from different noise.")
    buckets: Annotated[tuple[Bucket, ...], Field(min_length=1)] = Field((Bucket(),), description="Media shapes.")
    generators: Annotated[tuple[Generator, ...], Field(min_length=1)] = Field((Generator(),), description="Models that generate.")
    sampler: Sampler = Field(Sampler(), description="The sampler plan.")
    layout: Layout = Field(Layout(), description="How the sampler runs.")
    score: Score = Field(Score(), description="Scores without a model, before the judge.")
    judge: Judge = Field(Judge(), description="The judge.")
    caption: Caption | None = Field(Caption(), description="The captioner; null writes no captions.")
    target: Target = Field(Target(), description="When there is enough; left out, all planned samples are made.")
    budget: Budget = Field(Budget(), description="When to stop.")
    guards: dict[str, Any] = Field({}, description="Not built in yet; must be empty.")
    schedule: dict[str, Any] = Field({}, description="Not built in yet; must be empty.")
    policy: Policy = Field(Policy(), description="Policies.")
    output: Output = Field(Output(), description="Where it lands.")
    compute: Compute = Field(Compute(), description="What it may use.")

    @field_validator("guards", "schedule")
    @classmethod
    def _empty(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value:
            raise ValueError("not available in this version; remove it")
        return value


def load_spec(path: str | Path, overrides: list[str] | None = None) -> Spec:
    """The spec in a YAML file, with `a.b=c` overrides. Relative paths in it are taken from the working directory."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the path of a spec, or make one with `ditmill init`") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, found {type(data).__name__}; see `ditmill init`")
    return parse_spec(data, overrides, source=str(path))


def parse_spec(data: dict[str, Any], overrides: list[str] | None = None, source: str = "spec") -> Spec:
    """A spec from plain values."""
    for override in overrides or []:
        _override(data, override)
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {_explain(item)}" for item in error.errors())) from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected key=value, such as sampler.num_inference_steps=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    *parents, last = key.split(".")
    node: Any = data
    for at, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise UserError(f"--set {override}: {'.'.join(parents[:at])} holds a plain value, it has no {part}")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override}: {'.'.join(parents)} holds a plain value, it has no {last}")


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"--set {override}: {part} is no index into a list of {len(items)}")
    return int(part)


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "spec"
    found = item.get("input")
    shown = "" if isinstance(found, (dict, list)) else f", found {found!r}"
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or see `ditmill init --full` for all keys"
    if item["type"] == "missing":
        return f"{key}: is needed and missing"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}{shown}"


def absolute_paths(spec: Spec, base: str | Path = ".") -> Spec:
    """The spec with every local path made absolute, so that a worker on this machine finds what its driver meant."""
    root = Path(base).resolve()

    def fix(value: str | None) -> str | None:
        if value is None or "://" in value or not (value.startswith((".", "/", "~")) or (root / value).exists()):
            return value
        return str((root / Path(value).expanduser()).resolve())

    data = spec.model_dump()
    for generator in data["generators"]:
        generator["model"] = fix(generator["model"])
        for adapter in generator["adapters"]:
            adapter["uri"] = fix(adapter["uri"])
    for section in ("judge", "caption"):
        if data[section]:
            data[section]["model"] = fix(data[section]["model"])
    if data["judge"]["rubric"] != "default":
        data["judge"]["rubric"] = str((root / data["judge"]["rubric"]).resolve())
    prompts = data["prompts"]
    prompts["path"] = fix(prompts["path"])
    prompts["exclude"] = [fix(path) for path in prompts["exclude"]]
    if prompts["expand"]:
        prompts["expand"]["model"] = fix(prompts["expand"]["model"])
    if "://" not in data["output"]["uri"]:
        data["output"]["uri"] = os.path.abspath(os.path.join(root, data["output"]["uri"]))  # noqa: PTH100, PTH118
    return Spec.model_validate(data)
