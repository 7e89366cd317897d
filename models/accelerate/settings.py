"""Settings of a technique as a plan writes them: `{technique: first_block, threshold: 0.1}`.

Each technique's configuration is a frozen dataclass whose fields are made by `setting`. Plain values are read into one here,
with every mistake told by the key it is in; a field that is left out takes its default, so that one plan has one identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, field, fields
from typing import Any

TECHNIQUE = "technique"
"""The key that names it."""


class SettingError(ValueError):
    """`key`, empty for the whole technique, and what is wrong there."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def setting(
    default: Any,
    says: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a configuration. `says` describes it; a number is held between `least` and `most`, both included."""
    return field(default=default, metadata={"says": says, "least": least, "most": most, "choices": choices})


def read(config: type[Any], values: Mapping[str, Any]) -> Any:
    """The configuration that `values`, without the technique's name, say. SettingError names the key that is wrong."""
    known: dict[str, Field[Any]] = {each.name: each for each in fields(config)}
    for name in values:
        if name not in known:
            raise SettingError(str(name), f"unknown key; remove it, {config.name} has {', '.join(known) or 'no keys'}")
    return config(**{name: _checked(known[name], value) for name, value in values.items()})


def written(config: Any) -> dict[str, Any]:
    """The whole of a configuration as JSON has it."""
    return {TECHNIQUE: config.name} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()
    }


def described(config: type[Any]) -> list[tuple[str, str, Any, str]]:
    """Name, kind of value, default and description of each field."""
    rows = []
    for each in fields(config):
        default = None if each.default is MISSING else each.default
        rows.append((each.name, _kind(each), default, str(each.metadata["says"])))
    return rows


def _kind(each: Field[Any]) -> str:
    if choices := each.metadata["choices"]:
        return " or ".join(choices)
    kinds = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a list"}
    low, high = each.metadata["least"], each.metadata["most"]
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None]
    return " ".join([kinds[type(each.default)], " and ".join(bounds)]).strip()


def _checked(each: Field[Any], value: Any) -> Any:
    kind = type(each.default)
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    low, high = each.metadata["least"], each.metadata["most"]
    fits = (
        type(value) is kind
        and (not each.metadata["choices"] or value in each.metadata["choices"])
        and (not isinstance(value, float) or math.isfinite(value))
        and (low is None or value >= low)
        and (high is None or value <= high)
    )
    if not fits:
        raise SettingError(each.name, f"expected {_kind(each)}, found {value!r}")
    return value
