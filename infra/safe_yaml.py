"""YAML that a user gives: plain values only, in bounded time and memory, and one kind of error for all that can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 10_000_000
MOST_VALUES = 1_000_000
"""Values of a document with its aliases written out: ten lines of them can stand for more than a machine holds."""

_ODD = (RecursionError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
"""What PyYAML raises beside its own errors: for `2026-99-99`, a number of 5,000 digits, `!!bool perhaps`, 1,000 brackets."""


def read_yaml(path: Path) -> Any:
    """The one document in a file. Raises what opening and decoding raise, and yaml.YAMLError."""
    with path.open(encoding="utf-8-sig") as file:
        return load_yaml(file.read(MOST_CHARACTERS + 1))


def load_yaml(text: str) -> Any:
    """The one document in `text`. Whatever is wrong with it is a yaml.YAMLError: tags that make objects, a key that stands
    twice, aliases that stand for too much or for themselves."""
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {MOST_CHARACTERS:,} characters; keep prompts in a file of their own")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except _ODD as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise yaml.YAMLError(said) from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is a mistake, not the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below `node` and itself, each alias counted as often as it stands."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if (found := known.get(id(node))) is not None:
        if found == 0:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an anchor holds an alias of itself")
        return found
    known[id(node)] = 0
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 + sum(_count(part, known) for part in inner)
    if total > MOST_VALUES:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: aliases stand for more than {MOST_VALUES:,} values")
    known[id(node)] = total
    return total
