"""A rubric: the questions that the judge answers with Yes or No, as data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from infra.errors import UserError
from infra.safe_yaml import read_yaml

BUILT_IN = Path(__file__).parent / "rubrics"

PROMPT_CHARACTERS = 2000
"""How much of a prompt a question quotes; text encoders cut earlier than this."""

OVERALL = "overall"
"""Name of the mean of all answers by the rubric's weights, in thresholds."""

_TAKES = {"prompt", "media"}


class Question(BaseModel):
    """One question; Yes is the good answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Name of its score.")
    text: str = Field(description="Template with {prompt} and {media}, which is 'video' or 'image'.")
    threshold: float = Field(0.5, ge=0, le=1, description="Least P(yes) of an accepted sample.")
    weight: float = Field(1.0, ge=0, description="For those who rank samples by one number; no verdict depends on it.")
    media: Literal["any", "video", "image"] = Field("any", description="What it is asked about.")

    @field_validator("text")
    @classmethod
    def _is_template(cls, value: str) -> str:
        if not value.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise ValueError("expected Unicode text, found some that UTF-8 cannot hold")
        try:
            fields = [field for field in Formatter().parse(value) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"is no template ({error}); write {{{{ and }}}} for braces") from error
        if any(spec or conversion for _, _, spec, conversion in fields):  # {prompt:>999999999} would fill the memory
            raise ValueError("takes plain {prompt} and {media}, without : and !")
        unknown = {str(name) for _, name, _, _ in fields} - _TAKES
        if unknown:
            raise ValueError(f"takes {{prompt}} and {{media}}, and no {{{min(unknown)}}}")
        return value

    def asked(self, num_frames: int) -> bool:
        """Whether it is asked about media of `num_frames` frames; 1 is an image."""
        return self.media in ("any", _media(num_frames))

    def format(self, prompt: str, num_frames: int) -> str:
        """The question about one sample. `prompt` is quoted up to `PROMPT_CHARACTERS`."""
        quoted = " ".join(prompt[:PROMPT_CHARACTERS].split())
        return self.text.format(prompt=quoted, media=_media(num_frames))


class Rubric(BaseModel):
    """Questions that are asked about each sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Recorded with each score.")
    questions: tuple[Question, ...] = Field(description="Asked in this order.")

    @field_validator("questions")
    @classmethod
    def _are_sound(cls, questions: tuple[Question, ...]) -> tuple[Question, ...]:
        names = [question.name for question in questions]
        if not names:
            raise ValueError("at least one question is needed")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two questions have the name {name}")
        return questions

    @property
    def sha256(self) -> str:
        """Hash of what is asked and how it is weighed."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    @property
    def questions_sha256(self) -> str:
        """Hash of what is asked, which is all that scores depend on: another threshold or weight leaves it as it is."""
        asked = [[question.name, question.text, question.media] for question in self.questions]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def thresholds(self, overrides: dict[str, float] | None = None) -> dict[str, float]:
        """Least P(yes) for each question, the spec's `judge.thresholds` replacing the rubric's own."""
        return {question.name: question.threshold for question in self.questions} | (overrides or {})

    def only(self, names: Sequence[str]) -> Rubric:
        """The rubric with some of its questions; none of `names` means all."""
        return self.model_copy(update={"questions": tuple(q for q in self.questions if not names or q.name in names)})

    def overall(self, answers: Mapping[str, float]) -> float:
        """The weighted mean of the answers to this rubric's questions; NaN where there are none."""
        asked = [(question.weight, answers[question.name]) for question in self.questions if question.name in answers]
        total = sum(weight for weight, _ in asked)
        return sum(weight * value for weight, value in asked) / total if total else math.nan


def load_rubric(name_or_path: str) -> Rubric:
    """A built-in rubric by name, or a YAML file. Raises UserError that names `judge.rubric` and the key within."""
    built_in = sorted(file.stem for file in BUILT_IN.glob("*.yaml"))
    try:
        path = BUILT_IN / f"{name_or_path}.yaml" if name_or_path in built_in else Path(name_or_path).expanduser()
        data = read_yaml(path)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~nobody has no home
        raise UserError(
            f"judge.rubric: {name_or_path}: cannot be read ({error}); give one of {', '.join(built_in)}, or a YAML file"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"judge.rubric: {path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"judge.rubric: {path}: expected name and questions, found {type(data).__name__}")
    try:
        return Rubric.model_validate({"name": path.stem, **data})
    except ValidationError as error:
        raise UserError("\n".join(f"judge.rubric: {path}: {_explain(item)}" for item in error.errors())) from error


def check_thresholds(rubric: Rubric, thresholds: dict[str, float]) -> None:
    """Refuse thresholds for questions that the rubric does not ask, and ones that are no probability."""
    names = [question.name for question in rubric.questions]
    for name, value in thresholds.items():
        if name not in (*names, OVERALL):
            raise UserError(
                f"judge.thresholds.{name}: rubric {rubric.name} has no such question; it has {', '.join(names)}"
            )
        if not 0 <= value <= 1:
            raise UserError(f"judge.thresholds.{name}: expected a probability between 0 and 1, found {value}")


def decide(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> tuple[str, list[str]]:
    """The verdict of a sample, 'accepted' or 'rejected', and a reason for each threshold that it misses.

    A threshold whose question was not asked (motion, of an image) is not missed.
    """
    reasons = [
        f"{name} {_told(scores[name], bar)} < {bar:g}"
        for name, bar in thresholds.items()
        if name in scores and not scores[name] >= bar
    ]
    return ("rejected" if reasons else "accepted"), reasons


def _told(value: float, bar: float) -> str:
    """Two digits, or as many as set it apart from the bar."""
    return next((text for digits in range(2, 8) if float(text := f"{value:.{digits}f}") != bar), f"{value!r}")


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it"
    if item["type"] == "missing":
        return f"{key}: is needed and missing"
    found = "" if isinstance(item["input"], (dict, list)) else f", found {_shown(item['input'])}"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}{found}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1024:
        return "a very large number"  # Python refuses to write it out
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _media(num_frames: int) -> str:
    return "video" if num_frames > 1 else "image"
