"""A JSON value that a schema describes, made of a multimodal model's answers, one question a leaf.

Any model can: of text only the leaves are the model's, so braces and quotes are right with every tokenizer, also one that has
no token for them. A clip is read once; all leaves of a round are asked together, and there are as many rounds as
lists of objects lie in each other, and one more.

The `description` of a leaf is its question; without one its name is asked for. One of an `enum` is the value with the
highest P(yes), in a list of them each with at least 0.5; `{value}` in the description stands for it. A list of objects is
one question for the items, by the first property of an object, and the others for each item.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.captions import listed

VERSION = "1"
"""Changes whenever another value may come of the same schema and clip."""
MOST_ITEMS = 8
"""Items of a list whose schema has no maxItems."""
LEAST_YES = 0.5
JSON_TIMES = 8
"""Tokens that a caption as JSON may have, by those of one in prose, where it is written and not filled in."""

_LEAVES = ("string", "integer", "number", "boolean")
_KNOWN = frozenset({"object", "array", *_LEAVES})


class Asked(Protocol):
    def p_yes(self, frames: np.ndarray, questions: list[list[str]]) -> np.ndarray: ...
    def answer(
        self, frames: np.ndarray, texts: list[list[str]], max_new_tokens: int, temperature: float = 0.0
    ) -> list[list[str]]: ...


class Question(NamedTuple):
    text: str
    yes_no: bool  # answered with P(yes), else with a text


Filling = Generator[list[Question], list[Any], Any]
"""Asks round by round, and returns the value."""


def problem(schema: Any) -> str | None:
    """Why no value can be filled in by questions, in words for a person; None where it can."""
    return _problem(schema, "")


def is_strict(schema: Any) -> bool:
    """Whether all properties are required and no others allowed, as OpenAI's strict mode asks for."""
    if isinstance(schema, Mapping):
        if "properties" in schema and (
            schema.get("additionalProperties") is not False
            or set(schema.get("required", ())) != set(schema["properties"])
        ):
            return False
        return all(is_strict(value) for value in schema.values())
    return not isinstance(schema, list) or all(map(is_strict, schema))


def parsed(text: Any) -> Any:
    """The JSON value that a text holds; None where there is none, or one that cannot be stored: NaN, half a surrogate."""
    try:
        value = json.loads(str(text))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value
    except (ValueError, RecursionError):
        return None


def fill(
    model: Asked, frames: np.ndarray, schema: Mapping[str, Any], max_new_tokens: int, temperature: float = 0.0
) -> list[Any]:
    """A value for each clip of frames uint8 [n, T, H, W, 3], of the types that `schema` says. Other rules of it may be
    broken; what could not be had is None or left out."""
    about = _About("video" if frames.shape[1] > 1 else "image")
    fillings = {clip: _value(schema, about) for clip in range(len(frames))}
    values: list[Any] = [None] * len(frames)
    answers: dict[int, list[Any] | None] = dict.fromkeys(fillings)
    while fillings:
        asked: dict[int, list[Question]] = {}
        for clip, filling in list(fillings.items()):
            try:
                asked[clip] = filling.send(answers[clip])  # type: ignore[arg-type]
            except StopIteration as end:
                values[clip] = end.value
                del fillings[clip]
        answers = dict(_answered(model, frames, asked, max_new_tokens, temperature))
    return values


def _answered(
    model: Asked, frames: np.ndarray, asked: dict[int, list[Question]], max_new_tokens: int, temperature: float
) -> dict[int, list[Any]]:
    answers: dict[int, list[Any]] = {clip: [None] * len(questions) for clip, questions in asked.items()}
    for yes_no in (True, False):
        places = {
            clip: [at for at, question in enumerate(questions) if question.yes_no == yes_no]
            for clip, questions in asked.items()
        }
        clips = [clip for clip, some in places.items() if some]
        if not clips:
            continue
        texts = [[asked[clip][at].text for at in places[clip]] for clip in clips]
        found: Sequence[Sequence[Any]] = (
            model.p_yes(frames[clips], texts).tolist()
            if yes_no
            else model.answer(frames[clips], texts, max_new_tokens, temperature)
        )
        for clip, row in zip(clips, found, strict=True):
            for at, value in zip(places[clip], row, strict=False):  # rows of p_yes are filled up
                answers[clip][at] = value
    return answers


@dataclass(frozen=True)
class _About:
    """What is asked about: a clip, or one of the things in it."""

    media: str
    name: str = ""
    item: str = ""

    def question(self, schema: Mapping[str, Any], value: Any = None) -> str:
        asked = " ".join(
            str(schema.get("description") or f"What is the {self.name or 'content'} of this {{media}}?").split()
        )
        asked = asked.replace("{media}", self.media)
        if self.item:
            asked = asked.replace("{item}", self.item) if "{item}" in asked else f'About "{self.item}": {asked}'
        if value is None:
            return asked
        said = value if isinstance(value, str) else json.dumps(value)
        return asked.replace("{value}", said) if "{value}" in asked else f'{asked} Is it "{said}"? Answer Yes or No.'


def _value(schema: Mapping[str, Any], about: _About) -> Filling:
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        chances = yield [Question(about.question(schema, value), True) for value in schema["enum"]]
        return schema["enum"][int(np.argmax(np.nan_to_num(chances)))]
    kind = _type(schema)
    if kind == "object":
        names = list(schema["properties"])
        parts = [_value(schema["properties"][name], _About(about.media, name, about.item)) for name in names]
        values = yield from _together(parts)
        return _present(schema, dict(zip(names, values, strict=True)))
    if kind == "array":
        return (yield from _items(schema, about))
    if kind == "boolean":
        (chance,) = yield [Question(f"{about.question(schema)} Answer Yes or No.", True)]
        return None if math.isnan(chance) else chance >= LEAST_YES
    hint = "Answer in a few words." if kind == "string" else "Answer with a number."
    (answer,) = yield [Question(f"{about.question(schema)} {hint}", False)]
    if kind == "string":
        return answer.strip() or None
    number = re.search(r"-?\d{1,15}(\.\d{1,15})?", answer)
    if number is None:
        return None
    return int(float(number[0])) if kind == "integer" else float(number[0])


def _items(schema: Mapping[str, Any], about: _About) -> Filling:
    items = schema["items"]
    if "enum" in items:
        asked = {"description": schema.get("description") or items.get("description")}
        chances = yield [Question(about.question(asked, value), True) for value in items["enum"]]
        found = [value for value, chance in zip(items["enum"], chances, strict=True) if chance >= LEAST_YES]
        return found[: int(schema.get("maxItems", len(found)))]
    (answer,) = yield [Question(f"{about.question(schema)} Answer with a list, separated by commas.", False)]
    names = listed(answer)[: int(schema.get("maxItems", MOST_ITEMS))]
    if _type(items) == "string":
        return names
    first, *rest = items["properties"]
    parts = [_value(items["properties"][name], _About(about.media, name, item)) for item in names for name in rest]
    values = yield from _together(parts)
    rows = [values[at * len(rest) : (at + 1) * len(rest)] for at in range(len(names))]
    return [
        _present(items, {first: item, **dict(zip(rest, row, strict=True))})
        for item, row in zip(names, rows, strict=True)
    ]


def _together(parts: list[Filling]) -> Filling:
    """All of them side by side: a round asks what each of them asks."""
    values: list[Any] = [None] * len(parts)
    answers: dict[int, list[Any] | None] = dict.fromkeys(range(len(parts)))
    while True:
        asked: dict[int, list[Question]] = {}
        for at, answer in answers.items():
            try:
                asked[at] = parts[at].send(answer)  # type: ignore[arg-type]
            except StopIteration as end:
                values[at] = end.value
        if not asked:
            return values
        found = iter((yield [question for some in asked.values() for question in some]))
        answers = {at: [next(found) for _ in some] for at, some in asked.items()}


def _present(schema: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Without what could not be had, where that may be left out."""
    required = schema.get("required", ())
    return {name: value for name, value in values.items() if value is not None or name in required}


def _type(schema: Mapping[str, Any]) -> str:
    return str(schema.get("type", ""))


def _problem(schema: Any, place: str) -> str | None:
    where = place or "the schema"
    if not isinstance(schema, Mapping):
        return f"{where} is no object"
    if "const" in schema:
        return None
    if "enum" in schema:
        return None if schema["enum"] else f"{where} has an empty enum"
    if not isinstance(schema.get("type"), str) or schema["type"] not in _KNOWN:
        return f"{where} has no single type of {', '.join(sorted(_KNOWN))}"
    if schema["type"] == "object":
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return f"{where} has no properties"
        return next(
            filter(None, (_problem(part, f"{place}.{name}".strip(".")) for name, part in properties.items())), None
        )
    if schema["type"] == "array":
        items = schema.get("items")
        if (wrong := _problem(items, f"{place}[]")) is not None:
            return wrong
        assert isinstance(items, Mapping)
        if "enum" in items or _type(items) == "string":
            return None
        if _type(items) != "object":
            return f"{place}[] is neither text nor an object"
        first = next(iter(items["properties"].values()))
        if _type(first) != "string" or "enum" in first:
            return f"{place}[] has a first property that is no text, by which its items are told apart"
    return None
