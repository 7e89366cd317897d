"""What a release is held to as a whole: near-duplicates and caps, as a YAML file and options of the command say.

keep: {overall: 0.6}
near_duplicates: {hash: 6, cosine: 0.99, match: either}
against: [v1]
embedding: {model: pack://shapes}
caps:
  - {by: "extra.category", most: 1000}
  - {by: "floor(score.motion)", share: 0.2}
  - {words: [red, blue, green], most: 500}
  - {by: topic, share: 0.05}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from infra.errors import UserError
from infra.safe_yaml import read_yaml
from pipelines.explain import explain
from pipelines.sections import Section

TOPIC = "topic"
MOST_BITS = 12
"""Looking further than this costs more than comparing all pairs; unrelated pictures differ in about 32 of 64."""


class EmbeddingRule(Section):
    """What computes embeddings: the vision tower of a multimodal model, or code of your own."""

    model: str | None = Field(None, description="A multimodal model in transformers' format, such as the judge's.")
    revision: str | None = Field(None, description="Hub revision.")
    call: str | None = Field(
        None, description="module:function that takes frames, uint8 [n, T, H, W, 3], and returns floats [n, d]."
    )
    version: str | None = Field(None, description="Version of that code.")
    num_frames: int = Field(8, ge=1, description="Frames that it is shown, evenly spaced.")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.model is None) == (self.call is None):
            raise ValueError("expected either model, or call: 'module:function' with a version")
        if self.call and not self.version:
            raise ValueError("call needs a version, so that what it has computed is known from what it would compute")
        return self


class NearDuplicates(Section):
    """When two samples count as one."""

    hash: float | None = Field(
        6,
        ge=0,
        le=MOST_BITS,
        description="Most bits of 64 in which perceptual hashes differ, averaged over three frames; null: no hashes.",
    )
    cosine: float | None = Field(None, gt=0, le=1, description="Least cosine of embeddings.")
    match: Literal["either", "both"] = Field("either", description="Whether one is enough where both are given.")

    @model_validator(mode="after")
    def _looks(self) -> Self:
        if self.hash is None and self.cosine is None:
            raise ValueError("expected hash, cosine or both")
        if self.match == "both" and (self.hash is None or self.cosine is None):
            raise ValueError("match: both needs hash and cosine")
        return self


class Cap(Section):
    """How many samples may have each value of an attribute."""

    by: str | None = Field(None, description="An SQL expression as in --where, a list counts by its items; or topic.")
    words: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(
        (), description="Instead: words to look for in the caption, whole ones; several in a row count as one."
    )
    most: int | None = Field(None, ge=1, description="Most samples of each value.")
    share: float | None = Field(None, gt=0, lt=1, description="Instead: largest share of the release.")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.by is None) == (not self.words):
            raise ValueError("expected by or words")
        if (self.most is None) == (self.share is None):
            raise ValueError("expected most or share")
        return self

    @property
    def title(self) -> str:
        return self.by or f"words {', '.join(self.words)}"


class Rules(Section):
    """What a release is held to as a whole."""

    near_duplicates: NearDuplicates | None = Field(None, description="Which samples are dropped for one like them.")
    against: tuple[str, ...] | Literal["all"] = Field(
        (), description="Earlier releases: what is in them, or near to it, is left out."
    )
    keep: dict[str, Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None,
        description="Score, or `overall`, the mean of all by `rank`, and the share of samples to keep, the best ones by it."
        " Left out, what `judge.thresholds` of the newest run leaves to releases; {}: none.",
    )
    caps: tuple[Cap, ...] = Field((), description="Applied together, best samples first.")
    embedding: EmbeddingRule | None = Field(None, description="For cosine and topic.")
    topics: int = Field(20, ge=2, le=1000, description="Clusters of embeddings that `topic` tells apart.")
    rank: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="Weights of scores; left out, those of the newest run's rubric."
    )

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        by_cosine = self.near_duplicates is not None and self.near_duplicates.cosine is not None
        if self.embedding is None and (by_cosine or self.by_topic):
            raise ValueError("cosine and topic need an embedding")
        if self.against and self.near_duplicates is None:
            raise ValueError("against needs near_duplicates")
        return self

    @property
    def by_topic(self) -> bool:
        return any(cap.by == TOPIC for cap in self.caps)

    def __bool__(self) -> bool:
        return bool(self.near_duplicates or self.caps or self.keep)


def read_rules(
    path: str | None = None, bits: float | None = None, against: str | None = None, caps: list[str] | None = None
) -> Rules:
    """The rules of a YAML file, if there is one, with those of options in their place; caps are added."""
    said = _read(path) if path else {}
    if bits is not None:
        near = said.get("near_duplicates")
        said["near_duplicates"] = {**(near if isinstance(near, dict) else {}), "hash": bits}
    if against is not None:
        said["against"] = "all" if against == "all" else [name for name in against.split(",") if name]
    if caps:
        added, there = [_cap(text) for text in caps], said.get("caps")
        if there is None or isinstance(there, list):
            said["caps"] = [*(there or ()), *added]
    try:
        return Rules.model_validate(said)
    except ValidationError as error:
        raise UserError("\n".join(f"{path or 'release'}: {line}" for line in explain(error, Rules))) from error


def _read(path: str) -> dict[str, Any]:
    try:
        said = read_yaml(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--rules: {path}: cannot be read ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"--rules: {path}: is not YAML: {' '.join(str(error).split())}; mend that line") from error
    if not isinstance(said, dict):
        raise UserError(f"--rules: {path}: expected near_duplicates or caps, found {type(said).__name__}")
    return said


def _cap(text: str) -> dict[str, Any]:
    """`tags=100` or `tags=20%`."""
    by, _, number = text.rpartition("=")
    if not by or not (found := re.fullmatch(r"(\d+|\d+(?:\.\d+)?(%))", number.strip())):
        raise UserError(f"--cap: expected BY=NUMBER or BY=SHARE%, such as tags=100, found {text!r}")
    return (
        {"by": by.strip(), "share": float(number.strip()[:-1]) / 100}
        if found[2]
        else {"by": by.strip(), "most": int(number)}
    )
