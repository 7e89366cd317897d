"""The JSON schema that a `structured` caption is held to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from infra.errors import UserError
from models.structured import problem

BUILT_IN = Path(__file__).parent / "schemas" / "media.json"
MOST_CHARACTERS = 100_000


def load_schema(path: str | None, fillable: bool) -> str:
    """The schema in a file, or the built-in one, as JSON; `fillable`: a model in this process is to fill it in.

    Raises UserError that names `caption.json_schema`.
    """
    file = BUILT_IN if path is None else Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
        schema = json.loads(text)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()  # ValueError: NaN, half a surrogate
    except (OSError, ValueError, RecursionError, RuntimeError) as error:  # RuntimeError: ~nobody has no home
        raise UserError(f"caption.json_schema: {file}: cannot be read as JSON ({_line(error)})") from error
    if (wrong := _wrong(schema)) is not None:
        raise UserError(f"caption.json_schema: {file}: is no JSON schema of an object: {wrong}")
    if fillable and (wrong := problem(schema)) is not None:
        raise UserError(
            f"caption.json_schema: {file}: {wrong}; a model in this process is asked leaf by leaf and cannot fill it in: mend"
            " it, or use backend vllm or openai"
        )
    return json.dumps(schema, ensure_ascii=False)


def is_valid(value: Any, schema: str) -> bool:
    """Whether a value holds to a schema that `load_schema` gave."""
    try:
        return bool(_validator(schema).is_valid(value))
    except RecursionError:
        return False


@cache
def _validator(schema: str) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for

    loaded = json.loads(schema)
    return validator_for(loaded, default=Draft202012Validator)(loaded)


def _wrong(schema: Any) -> str | None:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if not isinstance(schema, dict) or schema.get("type") != "object":
        return 'expected {"type": "object", ...}'
    for reference in _references(schema):
        if not reference.startswith("#"):
            return f"$ref {reference} leads out of it; write what stands there into it"
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
        is_valid({}, json.dumps(schema))  # follows its references
    except SchemaError as error:
        return f"{error.json_path}: {_line(error.message)}"
    except Exception as error:  # of referencing, which jsonschema wraps in types of its own
        return _line(error)
    return None


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (str(value[key]) for key in ("$ref", "$dynamicRef") if key in value)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(part)


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
