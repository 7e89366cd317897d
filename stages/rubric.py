"""A rubric: the questions that the judge answers with Yes or No, as data."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from infra.errors import UserError

BUILT_IN = Path(__file__).parent / "rubrics"

PROMPT_CHARACTERS = 2000
"""How much of a prompt a question quotes; text encoders cut earlier than this."""

_FIELDS = {"prompt", "media"}
_KEYS: dict[str, Any] = {"name": str, "text": str, "threshold": (int, float), "weight": (int, float), "media": str}


@dataclass(frozen=True)
class Question:
    """One question; Yes is the good answer."""

    name: str
    text: str  # template with {prompt} and {media}
    threshold: float = 0.5  # least P(yes) of an accepted sample
    weight: float = 1.0  # for those who rank samples by one number; no verdict depends on it
    media: str = "any"  # 'video': not asked about images; 'image': not asked about videos

    def asked(self, num_frames: int) -> bool:
        return self.media == "any" or self.media == _media(num_frames)

    def format(self, prompt: str, num_frames: int) -> str:
        """The question about one sample. `prompt` is quoted up to `PROMPT_CHARACTERS`."""
        quoted = " ".join(prompt[:PROMPT_CHARACTERS].split())
        return self.text.format(prompt=quoted, media=_media(num_frames))


@dataclass(frozen=True)
class Rubric:
    name: str
    questions: tuple[Question, ...]

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of what is asked and how it is weighed; recorded with each score."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def thresholds(self, overrides: dict[str, float] | None = None) -> dict[str, float]:
        """Least P(yes) for each question, the spec's `judge.thresholds` replacing the rubric's own."""
        return {question.name: question.threshold for question in self.questions} | (overrides or {})


def load_rubric(name_or_path: str) -> Rubric:
    """A built-in rubric by name, or a YAML file. Raises UserError that names `judge.rubric` and the key within."""
    path = BUILT_IN / f"{name_or_path}.yaml" if name_or_path.isidentifier() else Path(name_or_path).expanduser()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        built_in = ", ".join(sorted(file.stem for file in BUILT_IN.glob("*.yaml")))
        raise UserError(
            f"judge.rubric: {name_or_path}: cannot be read ({error.strerror}); give one of {built_in}, or a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"judge.rubric: {path}: is not YAML: {' '.join(str(error).split())}") from error
    return parse_rubric(data, source=str(path))


def parse_rubric(data: Any, source: str = "rubric") -> Rubric:
    """A rubric from plain values."""

    def wrong(key: str, message: str) -> UserError:
        return UserError(f"judge.rubric: {source}: {key}: {message}")

    if not isinstance(data, dict) or not isinstance(data.get("questions"), list) or not data["questions"]:
        raise wrong("questions", "expected a list of questions, each with a name and a text")
    for key in data.keys() - {"name", "questions"}:
        raise wrong(key, "unknown key; a rubric has name and questions")
    questions = []
    for index, item in enumerate(data["questions"]):
        at = f"questions.{index}"
        if not isinstance(item, dict):
            raise wrong(at, f"expected keys and values, found {item!r}")
        _check_question(item, at, wrong)
        questions.append(Question(**item))
    names = [question.name for question in questions]
    for name in names:
        if names.count(name) > 1:
            raise wrong("questions", f"the name {name} is used twice")
    return Rubric(str(data.get("name", Path(source).stem)), tuple(questions))


def _check_question(item: dict[str, Any], at: str, wrong: Any) -> None:
    for key, value in item.items():
        if key not in _KEYS:
            raise wrong(f"{at}.{key}", f"unknown key; a question has {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise wrong(f"{at}.{key}", f"expected {'a text' if _KEYS[key] is str else 'a number'}, found {value!r}")
    for key in ("name", "text"):
        if not item.get(key):
            raise wrong(f"{at}.{key}", "is needed and missing")
    if not item["name"].isidentifier():
        raise wrong(f"{at}.name", f"expected letters, digits and _, found {item['name']!r}")
    if not 0 <= item.get("threshold", 0.5) <= 1:
        raise wrong(f"{at}.threshold", f"expected a probability between 0 and 1, found {item['threshold']}")
    if item.get("media", "any") not in ("any", "video", "image"):
        raise wrong(f"{at}.media", f"expected any, video or image, found {item['media']!r}")
    try:
        fields = {name for _, name, _, _ in Formatter().parse(item["text"]) if name is not None}
    except ValueError as error:
        raise wrong(f"{at}.text", f"is no template ({error}); write {{{{ and }}}} for braces") from error
    if fields - _FIELDS:
        raise wrong(f"{at}.text", f"{{{min(fields - _FIELDS)}}} is unknown; a template takes {{prompt}} and {{media}}")


def check_thresholds(rubric: Rubric, thresholds: dict[str, float]) -> None:
    """Refuse thresholds for questions that the rubric does not ask, and ones that are no probability."""
    names = [question.name for question in rubric.questions]
    for name, value in thresholds.items():
        if name not in names:
            raise UserError(
                f"judge.thresholds.{name}: rubric {rubric.name} has no such question; it has {', '.join(names)}"
            )
        if not 0 <= value <= 1:
            raise UserError(f"judge.thresholds.{name}: expected a probability between 0 and 1, found {value}")


def _media(num_frames: int) -> str:
    return "video" if num_frames > 1 else "image"
