"""A rubric: the questions that the judge answers with Yes or No, as data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from infra.errors import UserError
from infra.safe_yaml import read_yaml
from models.facts import WHOLE

BUILT_IN = Path(__file__).parent / "rubrics"

PROMPT_CHARACTERS = 2000
"""How much of a prompt a question quotes; text encoders cut earlier than this."""

OVERALL = "overall"
"""Name of the mean of all answers by the rubric's weights, in thresholds."""

DECOMPOSED = "decomposed"
"""The question that is asked in parts, each about one fact of the prompt (see models/facts.py)."""

_ALWAYS = ("prompt", "media")
_TAKES = (*_ALWAYS, "negative_prompt", "tags")
_COLUMN = "extra."


NO_PARTS: Mapping[str, str] = MappingProxyType({})


def parts_of(negative_prompt: str, tags: Sequence[Any], extra: Mapping[str, Any]) -> dict[str, str]:
    """What a question may quote of a record beside its prompt; what is empty or not given is not there.

    `extra` holds the record's other columns: a list is quoted with commas, any other value that is no text as JSON. What is
    there of stored samples alone (`licence`, `decomposed`) is none of them.
    """
    columns = {f"{_COLUMN}{name}": value for name, value in extra.items() if name not in (DECOMPOSED, "licence")}
    values = {"negative_prompt": negative_prompt, "tags": tags, **columns}
    return {name: text for name, value in values.items() if (text := _quoted(_written(value)))}


class Question(BaseModel):
    """One question; Yes is the good answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="Name of its score.")
    text: str = Field(
        description="Template with {prompt}, {media} ('video' or 'image'), {negative_prompt}, {tags} and {extra.COLUMN}, any"
        " other column of the record."
    )
    threshold: float = Field(0.5, ge=0, le=1, description="Least P(yes) of an accepted sample.")
    weight: float = Field(
        1.0, ge=0, description="In `overall`, by which samples are ranked, and judged where it has a threshold."
    )
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
        unknown = {str(name) for _, name, _, _ in fields if name not in _TAKES and not _is_column(name)}
        if unknown:
            taken = ", ".join(f"{{{name}}}" for name in _TAKES)
            raise ValueError(f"takes {taken} and {{{_COLUMN}COLUMN}}, and no {{{min(unknown)}}}")
        return value

    @property
    def takes(self) -> frozenset[str]:
        """The parts of a record without which it is not asked."""
        return frozenset(name for _, name, _, _ in Formatter().parse(self.text) if name) - set(_ALWAYS)

    def asked(self, num_frames: int, parts: Mapping[str, str] = NO_PARTS) -> bool:
        """Whether it is asked about media of `num_frames` frames (1 is an image) of a record with these parts."""
        return self.media in ("any", media_of(num_frames)) and all(parts.get(name) for name in self.takes)

    def format(self, prompt: str, num_frames: int, parts: Mapping[str, str] = NO_PARTS) -> str:
        """The question about one sample of which it is asked. `prompt` is quoted up to `PROMPT_CHARACTERS`, as parts are."""
        values = {**parts, "prompt": _quoted(prompt), "media": media_of(num_frames)}
        return "".join(literal + (values[name] if name else "") for literal, name, _, _ in Formatter().parse(self.text))


class Rubric(BaseModel):
    """Questions that are asked about each sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*(\+[a-z0-9][a-z0-9_-]*)*$", description="Recorded with each score.")
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


def built_in_rubrics() -> list[str]:
    """Names of the rubrics that come with ditmill."""
    return sorted(file.stem for file in BUILT_IN.glob("*.yaml"))


def load_rubric(names_or_paths: str | Sequence[str]) -> Rubric:
    """Built-in rubrics by name, or YAML files; of several, one that asks the questions of all, named `first+second`.

    Raises UserError that names `judge.rubric` and the key within.
    """
    named = [names_or_paths] if isinstance(names_or_paths, str) else list(names_or_paths)
    rubrics = [_load(name) for name in named]
    if len(rubrics) == 1:
        return rubrics[0]
    asks: dict[str, str] = {}
    for rubric in rubrics:
        for question in rubric.questions:
            if (other := asks.get(question.name)) is not None:
                raise UserError(f"judge.rubric: {other} and {rubric.name} both ask {question.name}; drop or rename one")
            asks[question.name] = rubric.name
    questions = tuple(question for rubric in rubrics for question in rubric.questions)
    return Rubric(name="+".join(rubric.name for rubric in rubrics), questions=questions)


def with_decomposed(rubric: Rubric, threshold: float) -> Rubric:
    """The rubric with one more question, `decomposed`; its text is asked of a prompt that is not decomposed."""
    if any(question.name == DECOMPOSED for question in rubric.questions):
        raise UserError(
            f"judge.rubric: {rubric.name} has a question {DECOMPOSED}, which judge.decompose adds; rename it"
        )
    whole = Question(name=DECOMPOSED, text=WHOLE, threshold=threshold)
    return Rubric(name=rubric.name, questions=(*rubric.questions, whole))


def _load(name_or_path: str) -> Rubric:
    built_in = built_in_rubrics()
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
        if not (0 <= value <= 1 or value == -math.inf):  # one that is to be found
            raise UserError(f"judge.thresholds.{name}: expected a probability between 0 and 1, found {value}")


def check_screen(rubric: Rubric, names: Sequence[str]) -> None:
    """Refuse a screen that is asked what the rubric does not have."""
    known = [question.name for question in rubric.questions]
    for name in names:
        if name not in known:
            raise UserError(
                f"judge.screen.questions: rubric {rubric.name} has no question {name}; it has {', '.join(known)}"
            )


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


def media_of(num_frames: int) -> str:
    """What a question calls media of so many frames."""
    return "video" if num_frames > 1 else "image"


def _is_column(name: str | None) -> bool:
    return bool(name) and str(name).startswith(_COLUMN) and len(str(name)) > len(_COLUMN)


def _quoted(text: str) -> str:
    return " ".join(text[:PROMPT_CHARACTERS].split())


def _written(value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_written, value)))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
