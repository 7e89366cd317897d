"""The reference of the spec, docs/spec.md, made from the pydantic models that parse it.

python -m pipelines.spec_docs
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from models.accelerate.registry import KEY, TECHNIQUES
from models.accelerate.settings import described
from pipelines.spec import Spec

FILE = Path(__file__).resolve().parent.parent / "docs" / "spec.md"

HEAD = """# The spec

One YAML file is one dataset. Every key has a default but `prompts`; an unknown key is an error, and so is a value of the
wrong type. `ditmill run SPEC --set sampler.num_inference_steps=4` replaces a value, `ditmill init` writes a file to start
from, and [pipelines/examples](../pipelines/examples) has some that work. Paths are relative to the working directory.

This page is made from [pipelines/spec.py](../pipelines/spec.py) by `python -m pipelines.spec_docs`.
"""


def render() -> str:
    """docs/spec.md as it should be: a table for each section, in the order of the keys."""
    return HEAD + "".join(_section(key, model) for key, model in _sections("", Spec)) + _techniques()


def _techniques() -> str:
    """A table for each technique that a plan may name."""
    text = ""
    for name, technique in TECHNIQUES.items():
        rows = [
            f"| `{key}` | {kind} | `{json.dumps(list(default) if isinstance(default, tuple) else default)}` | {says} |"
            for key, kind, default, says in described(technique.config)
        ]
        head = [f"\n## `{KEY}[]`: `{name}`\n", f"{technique.config.__doc__}\n", "| key | value | default | |"]
        text += "\n".join([*head, "|---|---|---|---|", *rows]) + "\n"
    return text


def _sections(key: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield key, model
    for name, info in model.model_fields.items():
        for inner in _models(info.annotation):
            yield from _sections(f"{key}.{name}".lstrip(".") + _index(info.annotation), inner)


def _section(key: str, model: type[BaseModel]) -> str:
    title = f"`{key}`" if key else "Top level"
    lines = [
        f"\n## {title}\n",
        f"{(model.__doc__ or '').strip()}\n",
        "| key | value | default | |",
        "|---|---|---|---|",
    ]
    lines += [_row(key, name, info) for name, info in model.model_fields.items()]
    return "\n".join(lines) + "\n"


def _row(key: str, name: str, info: FieldInfo) -> str:
    inner = next(_models(info.annotation), None)
    value = _type(info)
    if inner:
        anchor = f"{key}.{name}".translate({ord(sign): None for sign in ".[]"})
        value = value.replace("section", f"[section](#{anchor})")
    cells = [f"`{name}`", value, _default(info), info.description or (inner and inner.__doc__) or ""]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _type(info: FieldInfo) -> str:
    bounds = [
        f"{sign} {value}"
        for item in info.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if (value := getattr(item, name, None)) is not None and abs(value) < 2**32
    ]
    return " ".join([_name(info.annotation), *bounds])


def _name(annotation: Any) -> str:
    """A type as someone who writes YAML calls it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name(item) for item in arguments if item is not type(None)))
    if origin in (tuple, list):
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        key, value = (_name(item) for item in arguments)
        return f"map of {key} to {value}" if value != "any" else "map"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, "any")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "needed"
    default = info.default
    if isinstance(default, BaseModel) or (
        isinstance(default, tuple) and any(isinstance(x, BaseModel) for x in default)
    ):
        return ""
    return f"`{json.dumps(default)}`"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for item in get_args(annotation):
        yield from _models(item)


def _index(annotation: Any) -> str:
    """`[]` where the section is an item of a list."""
    return "[]" if get_origin(annotation) in (tuple, list, Annotated) else ""


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
