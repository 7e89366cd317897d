"""Files of prompt records, read as a stream: text, JSONL, CSV and Parquet, here or at any fsspec URL.

What is wrong with a file (it is missing, it does not parse, it has no prompts) is the user's mistake and ends in one line.
What is wrong with a prompt (it is empty, it is not UTF-8) is not: bytes that are no UTF-8 arrive as surrogate escapes, and
`pipelines.records` passes them on as a record that fails by itself.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import posixpath
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from infra.errors import UserError
from infra.opening import filesystem as open_filesystem
from infra.storage import Storage as Root

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

    from pipelines.spec import Storage

LINE_LIMIT = 1 << 26
"""Longest line or CSV field, in bytes: what is longer is no file of prompts, and memory stays bounded."""

PARQUET_ROWS = 1024

MEDIA_COLUMNS = ("first_frame", "image", "last_frame", "video", "mask", "audio")
"""Columns that hold the uri of one input; `image` is a first frame."""

FIELDS = frozenset(
    (
        "id",
        "inputs",
        "negative_prompt",
        "height",
        "width",
        "num_frames",
        "fps",
        "seed",
        "tags",
        "licence",
        "license",
        *MEDIA_COLUMNS,
    )
)
"""Columns that mean something beside the prompt; any other passes through."""


class Row(NamedTuple):
    """One record as its file has it."""

    place: str  # what an error message starts with: spec key, file and line
    fields: dict[str, Any] | None  # None for a blank line
    folder: str  # where relative uris of the record start: an absolute path or a URL


class File(NamedTuple):
    """One file of records."""

    fs: AbstractFileSystem
    path: str  # as the filesystem wants it
    name: str  # as the user knows it
    folder: str
    is_local: bool


def read_rows(uri: str, *, key: str, column: str = "prompt", storage: Storage | None = None) -> Iterator[Row]:
    """The records of a file, or of all files that a pattern with `*` names, in the order of their names.

    `key` is the spec's key that `uri` came from; `storage` says how to reach S3.
    """
    for file in _find(uri, key, storage):
        read = _READERS[_format(file.name, key)]
        found = False
        for row in _translated(file, key, read(file, key, column)):
            found = found or row.fields is not None
            yield row
        if not found:
            raise UserError(f"{key}: {file.name} holds no prompts; give a file with at least one")


def filesystem(uri: str, storage: Storage | None = None) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL, and the path on it. Credentials come from where the dataset's come from."""
    return open_filesystem(uri, Root(".", **storage.model_dump()) if storage else None)


def _find(uri: str, key: str, storage: Storage | None) -> list[File]:
    is_local = "://" not in uri
    try:
        if is_local:
            import fsspec

            fs, path = fsspec.filesystem("file"), uri
        else:
            fs, path = filesystem(uri, storage)
        paths = sorted(str(found) for found in fs.glob(path)) if "*" in path else [path]
        missing = not paths or not fs.exists(paths[0])
        folder = not missing and fs.isdir(paths[0])
    except Exception as error:
        raise UserError(
            f"{key}: {uri} cannot be reached ({type(error).__name__}: {_line(error)}); check the URL and its credentials"
        ) from error
    if missing:
        raise UserError(f"{key}: {uri} does not exist; give the path of a text, JSONL, CSV or Parquet file")
    if folder:
        raise UserError(f"{key}: {uri} is a folder; name its files, such as {uri.rstrip('/')}/*.parquet")
    return [_file(fs, found, uri if found == path else found, is_local) for found in paths]


def _file(fs: AbstractFileSystem, path: str, name: str, is_local: bool) -> File:
    whole = os.path.abspath(path) if is_local else str(fs.unstrip_protocol(path))  # noqa: PTH100
    return File(fs, path, name, posixpath.dirname(whole), is_local)


def _format(name: str, key: str) -> str:
    inner = name.lower().removesuffix(".gz").removesuffix(".zst")
    packed = inner != name.lower()
    suffix = posixpath.splitext(inner)[1]
    if suffix not in _READERS or (packed and suffix == ".parquet"):
        raise UserError(
            f"{key}: {name} is of an unknown format; expected .txt, .jsonl, .ndjson or .csv (also .gz, .zst), or .parquet"
        )
    return suffix


def _translated(file: File, key: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Errors that the bytes of a file cause, as one line. A store that fails half-way is not the user's mistake."""
    import pyarrow as pa

    try:
        yield from rows
    except (
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
        csv.Error,
        ValueError,
        OverflowError,
        LookupError,
        pa.ArrowException,
    ) as error:
        raise UserError(f"{key}: {file.name} is damaged ({_line(error)}); write it again") from error
    except OSError as error:
        if not file.is_local:
            raise
        mend = "write it again" if error.errno is None else "check the file and its permissions"
        raise UserError(f"{key}: {file.name} cannot be read ({_line(error)}); {mend}") from error


def _open(file: File) -> IO[bytes]:
    # fsspec's own files differ in what they offer; a buffered reader is the same on all of them
    opened = io.BufferedReader(file.fs.open(file.path, "rb"))
    if file.path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=opened)  # type: ignore[return-value]
    if file.path.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(opened, "r"), "zstd"))
    return opened


def _lines(file: File, key: str) -> Iterator[tuple[int, str]]:
    """Lines from 1, without their ends. Only a line feed ends one, as JSONL has it."""
    with _open(file) as opened:
        number = 0
        while line := opened.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise UserError(
                    f"{key}: {file.name}, line {number} is longer than {LINE_LIMIT >> 20} MiB; is this a file of prompts?"
                )
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{key}: {file.name} is UTF-16; save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def _text(file: File, key: str, column: str) -> Iterator[Row]:
    for number, line in _lines(file, key):
        prompt = line.strip()
        yield Row(f"{key}: {file.name}, line {number}", {column: prompt} if prompt else None, file.folder)


def _jsonl(file: File, key: str, column: str) -> Iterator[Row]:
    for number, line in _lines(file, key):
        place = f"{key}: {file.name}, line {number}"
        if not line.strip():
            yield Row(place, None, file.folder)
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else _line(error)
            raise UserError(f"{place}: is not JSON ({said}); write one object a line") from error
        if not isinstance(fields, dict):
            raise UserError(f'{place}: expected an object such as {{"{column}": "..."}}, found {type(fields).__name__}')
        if column not in fields:
            raise UserError(no_prompt(place, column, fields))
        yield Row(place, fields, file.folder)


def _csv(file: File, key: str, column: str) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT)
    with _open(file) as opened, io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.reader(_bounded(text, file, key))
        header: list[str] | None = None
        for cells in reader:
            place = f"{key}: {file.name}, line {reader.line_num}"
            if not any(cells):
                yield Row(place, None, file.folder)
            elif header is None:
                header = [cell.strip() for cell in cells]
                if column not in header:
                    raise UserError(no_prompt(place, column, header))
            elif len(cells) > len(header):
                raise UserError(
                    f"{place}: expected {len(header)} cells, found {len(cells)}; put a cell with commas in quotes"
                )
            else:
                yield Row(place, dict(zip(header, cells, strict=False)), file.folder)


def _bounded(text: IO[str], file: File, key: str) -> Iterator[str]:
    """The lines of a CSV file; the reader's own limit is on cells that it holds already."""
    while line := text.readline(LINE_LIMIT + 1):
        if len(line) > LINE_LIMIT:
            raise UserError(
                f"{key}: {file.name}: a line is longer than {LINE_LIMIT >> 20} MiB; is this a file of prompts?"
            )
        yield line


def _parquet(file: File, key: str, column: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with file.fs.open(file.path, "rb") as opened:
        table = pq.ParquetFile(opened)
        schema = table.schema_arrow
        if column not in schema.names:
            raise UserError(no_prompt(f"{key}: {file.name}", column, schema.names))
        # bytes beside the prompt (thumbnails, embeddings) are neither read nor passed on
        names = [field.name for field in schema if field.name in {column, *FIELDS} or not _holds_bytes(field.type)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{key}: {file.name}: column {twice[:40]!r} stands twice; give each its own name")
        number = 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=names):
            for values in zip(*(_values(batch.column(name)) for name in names), strict=True):
                number += 1
                yield Row(f"{key}: {file.name}, row {number}", dict(zip(names, values, strict=True)), file.folder)


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Parquet promises UTF-8 and does not check it
        return [_decoded(value) for value in column.cast(_as_binary(column.type)).to_pylist()]
    except (ValueError, OverflowError):  # a time that Python cannot hold: in the year 300,000, or of nanoseconds
        return column.cast("string").to_pylist()


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(at).type) for at in range(kind.num_fields))


def _as_binary(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return _as_binary(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_as_binary(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_binary(field.type)) for field in kind])
    return kind


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    return value


def no_prompt(place: str, column: str, found: list[str] | Mapping[str, Any]) -> str:
    names = ", ".join(" ".join(str(name)[:40].split()) for name in list(found)[:20]) or "none"
    return f"{place}: has no column {column!r}, found {names}; name the prompt's column in prompts.column"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


_READERS: dict[str, Callable[[File, str, str], Iterator[Row]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json-lines": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
