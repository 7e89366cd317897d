"""The spec: one dataset, and how its YAML file is read. The keys of each section are in `pipelines.sections`."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from infra.errors import UserError
from infra.safe_yaml import read_yaml
from pipelines.curation import Clip, Cut, Source, Texture, check_curation
from pipelines.explain import explain
from pipelines.guards import Guards
from pipelines.kept import check_recipe, with_defaults
from pipelines.overrides import override
from pipelines.placement import Compute
from pipelines.policy import Policy, named_urls, refusal
from pipelines.sampling import Sampler
from pipelines.schedule import Notify, Schedule
from pipelines.sections import (
    DEFAULT_PACK,
    Adapter,
    Bucket,
    Budget,
    Expand,
    Generator,
    Layout,
    Output,
    Parallel,
    Prompts,
    Score,
    Section,
    Storage,
    Target,
    Trajectory,
)
from pipelines.values import check_values
from pipelines.viewers import Caption, Judge
from stages.rubric import built_in_rubrics

__all__ = [
    "DEFAULT_PACK",
    "Adapter",
    "Bucket",
    "Budget",
    "Caption",
    "Clip",
    "Compute",
    "Cut",
    "Expand",
    "Generator",
    "Guards",
    "Judge",
    "Layout",
    "Notify",
    "Output",
    "Parallel",
    "Policy",
    "Prompts",
    "Sampler",
    "Schedule",
    "Score",
    "Source",
    "Spec",
    "Storage",
    "Target",
    "Texture",
    "Trajectory",
    "absolute_paths",
    "load_spec",
    "parse_spec",
]


class Spec(Section):
    """One dataset."""

    name: str = Field(
        "dataset",
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        description="Name of the dataset: lower-case letters, digits, - and _.",
    )
    recipe: Literal["synthetic", "reflow", "trajectory", "prompts", "curate"] = Field(
        "synthetic",
        description="Kind of dataset: judged media; noise and final latents; states of the teacher's path; prompts with their"
        " embeddings; clips of media that exist.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Enters the noise of every sample that gives none itself.")
    prompts: Prompts = Field(description="Where prompts come from: {path: prompts.txt}, or {inline: [a prompt]}.")
    sources: tuple[Source, ...] = Field((), description="Media of recipe curate, in the place of prompts.")
    cut: Cut = Field(Cut(), description="How they become clips.")
    clip: Clip = Field(Clip(), description="What of a clip is looked at and kept.")
    texture: Texture = Field(Texture(), description="Scores of a clip's surface, after `score`.")
    samples_per_prompt: int = Field(1, ge=1, description="Samples of each prompt, from different noise.")
    buckets: Annotated[tuple[Bucket, ...], Field(min_length=1)] = Field((Bucket(),), description="Media shapes.")
    generators: tuple[Generator, ...] = Field((Generator(),), description="Models that generate.")
    sampler: Sampler = Field(Sampler(), description="The sampler plan.")
    trajectory: Trajectory | None = Field(None, description="States of recipe trajectory.")
    layout: Layout = Field(Layout(), description="How the sampler runs.")
    score: Score = Field(Score(), description="Scores without a model, before the judge.")
    judge: Judge = Field(Judge(), description="The judge.")
    caption: Caption | None = Field(Caption(), description="The captioner; null writes no captions.")
    target: Target = Field(Target(), description="When there is enough; left out, all planned samples are made.")
    budget: Budget = Field(Budget(), description="When to stop.")
    guards: Guards = Field(Guards(), description="What ends a run that goes wrong.")
    schedule: Schedule = Field(Schedule(), description="When it runs by itself.")
    notify: Notify = Field(Notify(), description="Who is told of its end.")
    policy: Policy = Field(Policy(), description="Policies.")
    output: Output = Field(Output(), description="Where it lands.")
    compute: Compute = Field(Compute(), description="What it may use.")

    @model_validator(mode="before")
    @classmethod
    def _keeps_what_its_recipe_is_for(cls, data: Any) -> Any:
        """A recipe's own tensors and judge, where the spec names none."""
        return with_defaults(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _fits_its_recipe(self) -> Spec:
        check_curation(self)
        check_recipe(self)
        return self

    @model_validator(mode="after")
    def _names_allowed_places(self) -> Spec:
        for key, url in named_urls(self):
            if said := refusal(url, self.policy):
                raise ValueError(f"{key}: {said}")
        return self


def load_spec(path: str | Path, overrides: list[str] | None = None) -> Spec:
    """The spec in a YAML file, with `a.b=c` overrides. Relative paths in it are taken from the working directory."""
    try:
        data = read_yaml(Path(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be read ({reason}); give a spec's path, or make one with `ditmill init`"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}; mend that line") from error
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise UserError(f"{path}: expected keys and values, found {found}; make a spec with `ditmill init`")
    return parse_spec(data, overrides, source=str(path))


def parse_spec(data: dict[str, Any], overrides: list[str] | None = None, source: str = "spec") -> Spec:
    """A spec from plain values."""
    check_values(data, source)
    data = deepcopy(data)
    if overrides:
        defaults = Spec(prompts=Prompts(inline=("",))).model_dump(mode="json", exclude={"prompts"})
        for assignment in overrides:
            override(data, assignment, defaults)
        check_values(data, "--set")
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in explain(error, Spec))) from error


def absolute_paths(spec: Spec, base: str | Path = ".") -> Spec:
    """The spec with every local path made absolute, so that a worker on this machine finds what its driver meant."""
    root = Path(base).resolve()

    def file(value: str) -> str:
        return value if "://" in value else os.path.abspath(root / Path(value).expanduser())  # noqa: PTH100

    def model(value: str) -> str:
        """A model's name may also be a hub id: a path is what looks like one, or what is there."""
        is_path = value.startswith((".", "/", "~")) or (root / value).exists()
        return file(value) if is_path else value

    data = spec.model_dump()
    for generator in data["generators"]:
        generator["model"] = model(generator["model"])
        generator["teacher"] = generator["teacher"] and model(generator["teacher"])
        for adapter in generator["adapters"]:
            adapter["uri"] = model(adapter["uri"])
    prompts = data["prompts"]
    for section in (data["judge"], data["judge"]["screen"], data["caption"], prompts["expand"]):
        if section and section.get("backend") != "openai":
            section["model"] = model(section["model"])
    judge, built_in = data["judge"], built_in_rubrics()
    named = [judge["rubric"]] if isinstance(judge["rubric"], str) else judge["rubric"]
    named = [name if name in built_in else file(name) for name in named]
    judge["rubric"] = named[0] if isinstance(judge["rubric"], str) else named
    if judge["decompose"] and judge["decompose"]["model"]:
        judge["decompose"]["model"] = model(judge["decompose"]["model"])
    for bar in judge["thresholds"].values():
        if isinstance(bar, dict) and bar["labels"] is not None:
            bar["labels"] = file(bar["labels"])
    if data["caption"] and data["caption"]["json_schema"] is not None:
        data["caption"]["json_schema"] = file(data["caption"]["json_schema"])
    if prompts["path"] is not None:
        prompts["path"] = file(prompts["path"])
    for source in data["sources"]:
        source["path"] = file(source["path"])
    prompts["exclude"] = [file(path) for path in prompts["exclude"]]
    if data["sampler"]["plan"] not in (None, "auto"):
        data["sampler"]["plan"] = file(data["sampler"]["plan"])
    data["output"]["uri"] = file(data["output"]["uri"])
    return Spec.model_validate(data)
