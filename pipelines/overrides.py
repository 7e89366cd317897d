"""`--set a.b=c`: one value of a spec, replaced from the command line."""

from __future__ import annotations

from typing import Any

import yaml

from infra.errors import UserError
from infra.safe_yaml import load_yaml


def override(data: dict[str, Any], assignment: str, defaults: dict[str, Any]) -> None:
    """Set one key of `data` in place. Parts of the key are names, or indices into a list; the value is YAML.

    A list that `data` leaves out starts as the one in `defaults`, so that `buckets.0.height=128` changes the bucket there is.
    """
    key, equals, text = assignment.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"--set {assignment}: expected key=value, such as sampler.num_inference_steps=4")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment}: the value is not YAML; put it in quotes") from error
    node: Any = data
    default: Any = defaults
    for at, part in enumerate(parents):
        default = _under(default, part)
        follows_index = [*parents, last][at + 1].isdecimal()
        node = _child(node, part, default if follows_index else {}, assignment, parents[:at])
    if isinstance(node, list):
        node[_index(node, last, assignment)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise _plain(assignment, parents, last)


def _child(node: Any, part: str, new: Any, assignment: str, above: list[str]) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, assignment)]
    if not isinstance(node, dict):
        raise _plain(assignment, above, part)
    if node.get(part) is None:
        node[part] = new if new is not None else {}
    return node[part]


def _under(default: Any, part: str) -> Any:
    if isinstance(default, list):
        return default[int(part)] if _is_index(part) and int(part) < len(default) else None
    return default.get(part) if isinstance(default, dict) else None


def _is_index(part: str) -> bool:
    return part.isdecimal() and len(part) < 10


def _index(items: list[Any], part: str, assignment: str) -> int:
    if not _is_index(part) or int(part) >= len(items):
        valid = f"0 to {len(items) - 1}" if items else "none, for it is empty"
        raise UserError(
            f"--set {assignment}: expected an index ({valid}), found {part}; or set the whole list, key=[...]"
        )
    return int(part)


def _plain(assignment: str, above: list[str], part: str) -> UserError:
    key = ".".join(above)
    return UserError(f"--set {assignment}: {key} holds a plain value, it has no {part}; set {key} itself")
