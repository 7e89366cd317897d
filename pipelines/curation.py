"""Sections of the spec for recipe curate: where media come from, how they are cut, what of a clip is looked at and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from pipelines.sections import Section

if TYPE_CHECKING:
    from pipelines.spec import Spec

GENERATING = ("generators", "samples_per_prompt", "buckets", "sampler", "trajectory")
"""Sections that say how samples are generated."""
CURATING = ("sources", "cut", "clip", "texture")


class Shard(Section):
    """A part of a source, told by a hash of each uri: the parts are disjoint, and together they are all of it."""

    index: int = Field(ge=0, description="Which part, from 0.")
    count: int = Field(ge=1, description="How many there are.")

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.index >= self.count:
            raise ValueError(f"expected an index from 0 to {self.count - 1}, found {self.index}")
        return self


class Source(Section):
    """Media that exist: videos and images."""

    path: str = Field(
        description="A folder or a prefix of a bucket; tars, with * for several; a table (CSV, Parquet, JSONL) of uris, with"
        " * for several; or a ditmill release, DATASET/releases/NAME. A path or an fsspec URL."
    )
    kind: Literal["auto", "folder", "tar", "table", "release"] = Field(
        "auto", description="What path is; auto tells it by its suffix, and a release by its manifest."
    )
    column: str = Field("url", description="Of a table: the column of uris.")
    caption: str = Field(
        "caption",
        description="Where captions are: the column of a table; beside a file, the key of its .json. A .txt beside it is one"
        " as it is.",
    )
    licence: str = Field("", description="Of what it holds, where a file or row does not say.")
    tags: tuple[str, ...] = Field((), description="Tags of all that it holds.")
    limit: int | None = Field(None, ge=1, description="Take no more than the first so many, after `shard`.")
    shard: Shard | None = Field(None, description="Take a part only.")


class Cut(Section):
    """How a source becomes clips. A bound on files that is passed fails the file."""

    detector: Literal["adaptive", "content", "hash", "none"] = Field(
        "adaptive",
        description="What finds cuts: PySceneDetect's detector of that name; none takes a file as one scene.",
    )
    threshold: float | None = Field(None, gt=0, description="Of the detector; left out, its own.")
    shortest: float = Field(2.0, gt=0, description="Seconds of the shortest clip; shorter scenes are dropped.")
    longest: float = Field(10.0, gt=0, description="Seconds of the longest clip; longer scenes are split evenly.")
    max_bytes: int = Field(64 * 2**30, ge=1, description="Largest file.")
    max_pixels: int = Field(8192 * 8192, ge=1, description="Largest frame, in pixels.")
    max_seconds: float = Field(6 * 3600, gt=0, description="Longest file.")

    @model_validator(mode="after")
    def _has_lengths(self) -> Self:
        if self.longest < 2 * self.shortest:
            raise ValueError(
                f"longest: expected at least twice shortest, so that every longer scene can be split, found {self.longest:g}"
                f" and {self.shortest:g}"
            )
        return self


class Clip(Section):
    """What of a clip is looked at, and what is kept of an accepted one."""

    fps: float | None = Field(
        None, gt=0, description="Frames a second of what is kept; left out, the source's average."
    )
    max_side: int | None = Field(
        None, ge=16, description="What is kept is scaled down to this longer side; left out, it keeps its own."
    )
    crop: bool = Field(True, description="Take black bars and borders off.")
    look_fps: float = Field(
        8.0, gt=0, description="Frames a second that scores, judge and captioner are shown, at most."
    )
    look_side: int = Field(256, ge=16, description="Longer side, in pixels, of what they are shown, at most.")
    caption_match: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Least P(yes) by the judge's model that a clip shows what its source's caption says; below it the caption"
        " is not taken over. 0 asks nothing and takes all.",
    )


class Texture(Section):
    """ScoreTexture: what cheap statistics say of a picture's surface. A bound that is left out rejects nothing."""

    max_flatness: float | None = Field(None, ge=0, le=1, description="Share of flat tiles (UltraFlux), 0-1.")
    min_entropy: float | None = Field(None, ge=0, le=8, description="Shannon's entropy of luma, bits a pixel.")
    min_luminance: float | None = Field(None, description="BT.709's luminance, 0-255.")
    max_luminance: float | None = Field(None, description="The same, from above.")
    max_text_area: float | None = Field(None, ge=0, le=1, description="Share of the frame within lines of text.")
    max_duplicate_frames: float | None = Field(
        None, ge=0, le=1, description="Share of frames that are as the one before."
    )
    max_frozen: float | None = Field(
        None, ge=0, le=1, description="Longest run of equal frames, as a share of the clip."
    )


def defaults(data: dict[str, object]) -> dict[str, object]:
    """Plain values of a spec of recipe curate, with nothing that generates."""
    output = data.get("output", {})
    unmarked = {"output": {"marked": False, **output}} if isinstance(output, dict) else {}
    judge = data.get("judge", {})
    footage = {"judge": {"rubric": "footage", **judge}} if isinstance(judge, dict) else {}
    return {"prompts": {}, "generators": [], **data, **unmarked, **footage}


def check_curation(spec: Spec) -> None:
    """ValueError, which names the key, where a spec mixes curating with generating."""
    fields = type(spec).model_fields
    changed = {key for key in fields if key != "generators" and getattr(spec, key) != fields[key].get_default()}
    if spec.recipe != "curate":
        for key in CURATING:
            if key in changed:
                raise ValueError(f"{key}: recipe {spec.recipe} generates its media; set recipe: curate, or remove it")
        if spec.prompts.path is None and not spec.prompts.inline:
            raise ValueError("prompts: give exactly one of prompts.path and prompts.inline")
        if not spec.generators:
            raise ValueError("generators: expected at least 1 of them, found an empty list")
        return
    if not spec.sources:
        raise ValueError("sources: recipe curate needs at least one; give {path: FOLDER}")
    if spec.prompts != type(spec.prompts)():
        raise ValueError("prompts: recipe curate takes clips from sources; remove it")
    for key in GENERATING:
        if key in changed or (key == "generators" and spec.generators):
            raise ValueError(f"{key}: recipe curate generates nothing; remove it")
    if spec.output.tensors:
        raise ValueError("output.tensors: recipe curate has no tensors; remove it")
    if spec.output.keep_rejected in ("latents", "media"):
        raise ValueError(
            f"output.keep_rejected: expected preview or none with recipe curate, found {spec.output.keep_rejected}; a clip"
            " can be cut again from its source"
        )
    if spec.output.marked:
        raise ValueError("output.marked: recipe curate makes no media that a mark would be true of; remove it")
    if spec.judge.decompose is not None:
        raise ValueError("judge.decompose: recipe curate has captions to check, no prompts to decompose; remove it")
