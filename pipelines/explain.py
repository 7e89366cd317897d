"""What pydantic found wrong with a spec, said to the person who wrote it: one line a mistake, with the key and the mend."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Loc = tuple[int | str, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "tuple_type": "a list",
    "too_short": "at least {min_length} of them",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "string_pattern_mismatch": "a text like {pattern}",
    "invalid_key": "a text as key",
}


TAGS = ("<number>", "<bar>")
"""Which member of a union a value was taken for (see pipelines.viewers)."""

OWN_KEY = "the whole: "
"""Before what is said of the whole spec, whose message names the key itself."""


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each key that is wrong."""
    lines: dict[str, list[str]] = {}
    tails: dict[str, str] = {}
    for item in error.errors(include_url=False):
        loc, field, section = _resolve(model, item["loc"])
        if item["type"] == "too_short" and item["input"]:
            continue  # its items are wrong, and each of them has a line of its own
        key = ".".join(str(part) for part in loc) or "spec"
        found = _shown(item.get("input"))
        if item["type"] == "extra_forbidden":
            lines[key] = [f"unknown key{_suggestion(model, section, loc)}"]
        elif item["type"] == "missing":
            lines[key] = ["is needed and missing"]
            tails[key] = _described(field)
        elif item["type"] == "value_error":
            key = key if loc else OWN_KEY.removesuffix(": ")
            inner = getattr(item.get("ctx", {}).get("error"), "key", "")
            key += f".{inner}" if inner else ""
            lines.setdefault(key, []).append(item["msg"].removeprefix("Value error, "))
            tails[key] = "" if "found" in item["msg"] or isinstance(item.get("input"), dict) else f", found {found}"
        else:
            expected = _expected(item["type"], item["msg"], item.get("ctx", {}))
            lines.setdefault(key, []).append(expected if lines.get(key) else f"expected {expected}")
            tails[key] = f", found {found}{_described(field)}"
    said = [f"{key}: {' or '.join(words)}{tails.get(key, '')}".removeprefix(OWN_KEY) for key, words in lines.items()]
    return [" ".join(line.split()) for line in said]


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a model and of those below it, dotted, with its field; none of what a map with any keys holds."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        below = section_of(field)
        if below is not None and not is_free(field):
            yield from leaves(below, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds: itself, perhaps none, a list of it or a map to it."""
    return _find(field.annotation)


def map_keys(field: FieldInfo) -> tuple[str, ...]:
    """What a map's keys may be; nothing for a field of another kind, and where any will do."""
    return get_args(get_args(field.annotation)[0]) if get_origin(field.annotation) is dict else ()


def is_free(field: FieldInfo) -> bool:
    """Whether it is a map whose keys are the user's own."""
    return get_origin(field.annotation) is dict and not map_keys(field)


def _find(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _find(part)) is not None), None)


def _resolve(model: type[BaseModel], loc: Loc) -> tuple[Loc, FieldInfo | None, type[BaseModel] | None]:
    """A location without pydantic's own marks (union members, `[key]`), the field there, and the section it stands in."""
    loc = tuple(part for part in loc if part not in TAGS)
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    for at, part in enumerate(loc):
        if isinstance(part, int):
            continue
        if section is None:
            marks = [mark for mark in loc[at:] if mark in ("[key]", "str") or "[str" in str(mark)]
            return tuple(part for part in loc if part not in marks), field, None
        if field is not None and (is_free(field) or part in map_keys(field)):
            field = None  # what the map holds comes next
            continue
        if part not in section.model_fields:
            return loc[: at + 1], None, section
        field = section.model_fields[part]
        below = section_of(field)
        if below is None and at + 1 == len(loc):
            return loc, field, section
        section = below
    return loc, field, section


def _suggestion(model: type[BaseModel], section: type[BaseModel] | None, loc: Loc) -> str:
    name = str(loc[-1])
    here = list((section or model).model_fields)
    above = ".".join(str(part) for part in loc[:-1])
    close = get_close_matches(name, here, 1) or [known for known in here if name in known or known in name]
    if close:
        return f"; did you mean {above + '.' if above else ''}{close[0]}?"
    elsewhere = [key for key, _ in leaves(model) if key.split(".")[-1] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; remove it, {above or 'a spec'} has {', '.join(here)}"


def _expected(kind: str, message: str, context: dict[str, Any]) -> str:
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    return message.removeprefix("Input should be ")


def _described(field: FieldInfo | None) -> str:
    return f". {field.description}" if field is not None and field.description else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing (leave the key out instead)"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
