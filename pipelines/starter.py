"""Specs to start from: a commented YAML file, the JSON Schema that editors check it with, and a spec made of one prompt."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipelines.explain import is_free, map_keys, section_of
from pipelines.sections import PACK_GUIDANCE
from pipelines.spec import Spec, parse_spec

WIDTH = 110

STARTER: dict[str, Any] = {
    "name": "my-dataset",
    "prompts": {
        "inline": [
            "a red circle moving right on a white background",
            "a small blue square bouncing on a black background",
            "a large yellow star spinning in place on a grey background",
        ]
    },
    "sampler": {"guidance_scale": PACK_GUIDANCE},
    "output": {"uri": "out/my-dataset"},
}
"""What a starter has of its own; all else is the default."""

ESSENTIAL: dict[str, Any] = {
    "name": {},
    "prompts": {"inline": {}},
    "samples_per_prompt": {},
    "buckets": {"height": {}, "width": {}, "num_frames": {}, "fps": {}},
    "generators": {"model": {}},
    "sampler": {"num_inference_steps": {}, "guidance_scale": {}},
    "layout": {"batch_size": {}},
    "judge": {"model": {}, "thresholds": {}},
    "caption": {"model": {}, "styles": {}},
    "target": {"accepted": {}},
    "output": {"uri": {}, "keep_rejected": {}},
}
"""The keys that most people change."""

HEADS = {
    False: "A ditmill spec: the keys that most people change. `ditmill init --full` writes all of them, and"
    " `ditmill init --schema FILE` the JSON Schema that editors check a spec with.",
    True: "A ditmill spec with every key, most of them at their default. Keys may be left out."
    " `ditmill init --schema FILE` writes the JSON Schema that editors check a spec with.",
}


def starter_spec(full: bool = False) -> str:
    """A commented YAML file that loads and runs as it is; `full` has every key."""
    values = Spec.model_validate(STARTER).model_dump(mode="json")
    lines = [*_comment(HEADS[full], ""), *_section(Spec, values, None if full else ESSENTIAL, "")]
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a spec, with every key's documentation."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ditmill spec",
        **{key: value for key, value in Spec.model_json_schema().items() if key != "title"},
    }


def spec_for(
    prompt: str, number: int, *, model: str | None = None, uri: str | None = None, overrides: list[str] | None = None
) -> Spec:
    """A spec of `number` samples of one prompt.

    Asking for more samples of the same prompt later adds to the same dataset, in a folder named after the prompt.
    """
    name = slug(prompt)
    data: dict[str, Any] = {
        "name": name,
        "prompts": {"inline": [prompt]},
        "samples_per_prompt": number,
        "layout": {"batch_size": min(number, 8)},
        "output": {"uri": uri or f"out/{name}"},
    }
    data |= {"sampler": {"guidance_scale": PACK_GUIDANCE}} if model is None else {"generators": [{"model": model}]}
    return parse_spec(data, overrides, source="ditmill make")


def slug(text: str) -> str:
    """A dataset's name made of a text. Texts that it cannot spell out get a few digits of their hash, and stay apart."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    name = ""
    for word in words:
        if len(name) + len(word) > 40:
            break
        name = f"{name}-{word}" if name else word
    if name and " ".join(text.lower().split()) == name.replace("-", " "):
        return name
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()
    return f"{name or 'prompt'}-{digest}"


def _section(model: type[BaseModel], values: dict[str, Any], keep: dict[str, Any] | None, indent: str) -> Iterator[str]:
    """YAML lines of a section's keys, each with its documentation above it. `keep` None keeps them all."""
    for name, field in model.model_fields.items():
        if keep is not None and name not in keep:
            continue
        if not indent:
            yield ""
        yield from _comment(_says(field), indent)
        yield from _key(name, field, values[name], None if keep is None else keep[name], indent)


def _key(name: str, field: FieldInfo, value: Any, keep: dict[str, Any] | None, indent: str) -> Iterator[str]:
    below = None if is_free(field) else section_of(field)
    if below is None:
        shown = _value(value, indent)
        yield f"{indent}{name}:{shown}" if shown.startswith("\n") else f"{indent}{name}: {shown}"
    elif isinstance(value, dict) and value:
        yield f"{indent}{name}:"
        yield from _section(below, value, keep, indent + "  ")
    elif value:
        yield f"{indent}{name}:"
        for item in value:
            yield from _item(below, item, keep, indent)
    else:
        yield f"{indent}{name}: {_value(value, indent)}"
        example = {key: _plain(field.get_default()) for key, field in below.model_fields.items()}
        lines = list(_item(below, example, None, "") if value == [] else _section(below, example, None, "  "))
        if names := map_keys(field):
            lines = [f"  {names[0]}:  # or {', '.join(names[1:])}", *(f"  {line}" for line in lines)]
        yield from (f"{indent}# {line}" for line in (f"{name}:", *lines))


def _item(model: type[BaseModel], value: dict[str, Any], keep: dict[str, Any] | None, indent: str) -> Iterator[str]:
    """Lines of one item of a list; its first comment stands behind the dash."""
    first, *rest = _section(model, value, keep, indent + "    ")
    yield f"{indent}  - {first.strip()}"
    yield from rest


def _says(field: FieldInfo) -> str:
    """A key's documentation, with the values it may have where they are few."""
    options = _options(field.annotation)
    said = field.description or ""
    if len(options) < 2 or all(option in said for option in options):
        return said
    return f"{said} One of {', '.join(options)}."


def _options(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(option) for option in get_args(annotation)]
    if get_origin(annotation) is dict:
        return []
    return next((found for part in get_args(annotation) if (found := _options(part))), [])


def _plain(value: Any) -> Any:
    """A default as YAML has it; a key without one needs a value."""
    if value is PydanticUndefined:
        return "..."
    return list(value) if isinstance(value, tuple) else value


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent))]


def _value(value: Any, indent: str) -> str:
    """A plain value, or a list or map of them, as YAML."""
    if isinstance(value, list) and any(isinstance(item, str) and len(item) > 30 for item in value):
        return "".join(f"\n{indent}  - {_value(item, '')}" for item in value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
