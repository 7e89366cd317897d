"""The fields of a prompt record, checked one by one, from whatever a file's format makes of them.

A value of the wrong type is the user's mistake: one line that names place, column, what was expected and what was found.
A text that UTF-8 cannot hold and an input that cannot be read are the record's own trouble, and are told apart from it.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import file_digest
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.secrets import redact
from pipelines.identity import Input
from pipelines.policy import Policy, refusal
from pipelines.record_files import MEDIA_COLUMNS, Row, filesystem

if TYPE_CHECKING:
    from pipelines.spec import Storage

_SURROGATES = re.compile("[\ud800-\udfff]")
_SHA256 = re.compile("[0-9a-f]{64}")


def inputs_field(
    row: Row, fields: Mapping[str, Any], storage: Storage | None, policy: Policy | None = None
) -> tuple[tuple[Input, ...], str]:
    """The inputs of a record, their uris made absolute and their contents hashed, and why one of them cannot be read.

    One that `policy` does not let be opened is not opened; its uri comes back without its secrets.
    """
    listed = fields.get("inputs", [])
    if isinstance(listed, str):
        try:
            listed = json.loads(listed)
        except (ValueError, RecursionError):
            raise _wrong(row.place, "inputs", "a JSON list of {role, uri}", listed) from None
    if not isinstance(listed, (list, tuple)):
        raise _wrong(row.place, "inputs", "a list of {role, uri, sha256, start, end}", listed)
    items: list[tuple[str, Any]] = [(f"inputs.{at}", item) for at, item in enumerate(listed)]
    for name in MEDIA_COLUMNS:
        if name in fields:
            if not isinstance(fields[name], str):
                raise _wrong(row.place, name, "a path or URL", fields[name])
            items.append((name, {"role": "first_frame" if name == "image" else name, "uri": fields[name]}))
    inputs: list[Input] = []
    unreadable = ""
    for name, item in items:
        one = _input(row, name, item)
        if said := refusal(one.uri, policy or Policy()):
            unreadable = unreadable or said
            one = Input(one.role, redact(one.uri), one.sha256, one.start, one.end)
        elif not one.sha256:
            sha256, reason = _sha256(one.uri, storage)
            unreadable = unreadable or reason
            one = Input(one.role, one.uri, sha256, one.start, one.end)
        inputs.append(one)
    return tuple(inputs), unreadable


def _input(row: Row, name: str, item: Any) -> Input:
    if not isinstance(item, dict) or set(item) - {"role", "uri", "sha256", "start", "end"}:
        raise _wrong(row.place, name, "an object of role, uri, sha256, start and end", item)
    item = {key: value for key, value in item.items() if not is_absent(value)}
    for key in ("role", "uri"):
        if not isinstance(item.get(key), str):
            raise _wrong(row.place, f"{name}.{key}", "a text", item.get(key))
    sha256 = text_field(row.place, f"{name}.sha256", item.get("sha256", "")).lower()
    if sha256 and not _SHA256.fullmatch(sha256):
        raise _wrong(row.place, f"{name}.sha256", "64 hex digits", sha256)
    start, end = (
        number_field(row.place, f"{name}.{key}", item[key], zero=True) if key in item else None
        for key in ("start", "end")
    )
    if start is not None and end is not None and end <= start:
        raise _wrong(row.place, f"{name}.end", f"more than its start, {start}", end)
    uri = clean_text(item["uri"])[0]
    if "://" not in uri:
        uri = posixpath.join(row.folder, uri)
    return Input(clean_text(item["role"])[0], uri, sha256, start, end)


def _sha256(uri: str, storage: Storage | None) -> tuple[str, str]:
    """The sha256 of a file's bytes, or an empty one and the reason. A store that does not answer raises what it raises."""
    try:
        return _read_sha256(uri, storage), ""
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return "", f"{uri} cannot be read ({type(error).__name__})"
    except (ValueError, ImportError) as error:
        return "", f"{uri} cannot be read ({error})"
    except OSError as error:
        if "://" in uri:
            raise
        return "", f"{uri} cannot be read ({error.strerror or error})"


@lru_cache(maxsize=4096)
def _read_sha256(uri: str, storage: Storage | None) -> str:
    if "://" not in uri:
        with open(uri, "rb") as file:  # noqa: PTH123
            return file_digest(file, "sha256").hexdigest()
    fs, path = filesystem(uri, storage)
    with fs.open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def tags_field(place: str, value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise _wrong(place, "tags", "a list of texts, or one text with commas", value)
    return tuple(dict.fromkeys(clean_text(item.strip())[0] for item in items if item.strip()))


def text_field(place: str, name: str, value: Any, numbers: bool = False) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):  # Parquet of old writers has text as bytes
        return value.decode("utf-8", "surrogateescape")
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _wrong(place, name, "a text", value)


def whole_field(place: str, name: str, value: Any, least: int, most: int) -> int:
    number: Any = value
    if isinstance(value, str):
        try:
            number = int(value.strip())
        except ValueError:
            number = None
    elif isinstance(value, float) and value.is_integer():
        number = int(value)  # how pandas writes a column of integers with gaps
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise _wrong(place, name, f"a whole number from {least} to {most}", value)
    return number


def number_field(place: str, name: str, value: Any, zero: bool = False) -> float:
    number = math.nan
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise _wrong(place, name, "a number of at least 0" if zero else "a number above 0", value)
    return number


def _wrong(place: str, name: str, expected: str, found: Any) -> UserError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return UserError(f"{place}: {name}: expected {expected}, found {shown}; correct it or leave it out")


def is_absent(value: Any) -> bool:
    """What CSV, pandas and Parquet write where nothing is given."""
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def clean_text(text: str) -> tuple[str, bool]:
    """Text that UTF-8 can hold, and whether it had to be changed: bytes that are no UTF-8 become \\xNN."""
    if text.isascii() or not _SURROGATES.search(text):
        return text, False
    return _SURROGATES.sub(_escaped, text), True


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def clean(value: Any) -> Any:
    """A value that strict JSON can hold; what has no place in JSON (dates, decimals) becomes its text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return clean_text(value)[0]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean_text(str(name))[0]: clean(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [clean(item) for item in value]
    return clean_text(str(value))[0]
