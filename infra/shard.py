"""The bytes of a media shard: a WebDataset tar, and the safetensors in it. The same members give the same bytes.

Each member is one header made from a zeroed TarInfo and its data, so that the offset of the data is known as it is
written and neither clock nor user enters the bytes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

BLOCK = tarfile.BLOCKSIZE
MEMBER = re.compile(
    r"[a-z0-9_-]+\.(((trajectory|noise)\.)?safetensors(\.zst)?|[a-z0-9]+\.npy|trajectory\.json|[a-z0-9]+)"
)
"""A key and a suffix. Loaders take what comes after the first dot as the kind of a member."""
LONGEST_NAME = 100  # of the USTAR name field

EMPTY = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))  # mtime, uid and gid are 0, the mode is 0644
EMPTY[148:156] = b" " * 8  # the checksum is of a header with spaces here
EMPTY_SUM = sum(EMPTY) - sum(EMPTY[124:136])

Place = tuple[int, int]
"""Offset of a member's data in its tar, and its length, in bytes."""


def outside(shard: str | None) -> bool:
    """Whether a row's reference leads out of its dataset's root. Rows are as trustworthy as who wrote the dataset."""
    name = shard or ""
    return not name or "://" in name or "\0" in name or name.startswith("/") or ".." in name.split("/")


def is_member(name: str, sample_id: str) -> bool:
    """Whether a tar's member is named as those of a sample are: by its id."""
    return MEMBER.fullmatch(name) is not None and len(name) <= LONGEST_NAME and name.startswith(f"{sample_id}.")


class SupportsWrite(Protocol):
    """A file that can be written to."""

    def write(self, data: bytes, /) -> object: ...


ZSTD = b"\x28\xb5\x2f\xfd"
"""How a zstd frame begins; as the length of a safetensors header it would be 4 GB."""
ZSTD_LEVEL = 3

SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class TarWriter:
    """Writes a USTAR tar to `file`, member by member, in the order in which they come.

    Names are `<key>.<suffix>`, lower case: WebDataset takes all that share a key, side by side, as one sample.
    """

    def __init__(self, file: SupportsWrite) -> None:
        self._file = file
        self._at = 0
        self._names: set[str] = set()

    def add(self, name: str, data: bytes) -> Place:
        """Write one member; where its data lies. Raises ValueError for any other name and for one that comes twice."""
        if not MEMBER.fullmatch(name) or len(name) > LONGEST_NAME:
            raise ValueError(
                f"tar member {name!r}: expected <sample_id>.<suffix> of a-z 0-9 _ -, at most {LONGEST_NAME} characters"
            )
        if name in self._names:
            raise ValueError(f"tar member {name!r} comes twice")
        self._names.add(name)
        place = (self._at + BLOCK, len(data))
        padding = -len(data) % BLOCK
        for piece in (_header(name, len(data)), data, bytes(padding)):
            self._file.write(piece)
        self._at += BLOCK + len(data) + padding
        return place

    def close(self) -> None:
        """Write the end of the tar; the file stays open."""
        self._file.write(bytes(2 * BLOCK))


def build_tar(members: list[tuple[str, bytes]]) -> tuple[bytes, dict[str, Place]]:
    """A USTAR tar of `members` (name, data), sorted by name, and where each one's data lies in it."""
    file = io.BytesIO()
    tar = TarWriter(file)
    # By key, then suffix: a dot comes after "-" and before all else that is in a name, and must come first.
    places = {
        name: tar.add(name, data) for name, data in sorted(members, key=lambda member: member[0].replace(".", " "))
    }
    tar.close()
    return file.getvalue(), places


def _header(name: str, nbytes: int) -> bytes:
    """The header of a member: an empty one with name, size and checksum, at a tenth of what tarfile takes."""
    if nbytes >= 8**11:
        raise ValueError(f"tar member {name!r}: expected less than 8 GiB, found {nbytes} bytes")
    header = bytearray(EMPTY)
    key, length = name.encode("ascii"), b"%011o\0" % nbytes
    header[: len(key)] = key
    header[124:136] = length
    header[148:156] = b"%06o\0 " % (EMPTY_SUM + sum(key) + sum(length))
    return bytes(header)


def safetensors_bytes(name: str, array: np.ndarray, dtype: str, metadata: dict[str, str]) -> bytes:
    """One float array as a safetensors file (see `safetensors_of`)."""
    return safetensors_of({name: array}, dtype, metadata)


def safetensors_of(arrays: Mapping[str, np.ndarray], dtype: str, metadata: dict[str, str]) -> bytes:
    """A safetensors file: float arrays cast to `dtype`, which is float32, float16 or bfloat16, rounded to nearest even;
    whole numbers and booleans as int64.

    The safetensors package writes metadata in an order that changes from run to run; here keys are sorted.
    Raises ValueError where a value is not finite or does not fit.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    parts: list[bytes] = []
    at = 0
    for name in sorted(arrays):
        kind, data = _encoded(name, arrays[name], dtype)
        header[name] = {"dtype": kind, "shape": list(arrays[name].shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_safetensors(data: bytes, name: str) -> np.ndarray:
    """The array `name` of a safetensors file, as float32. Raises ValueError where `data` is no such file or lacks it."""
    try:
        return read_arrays(data)[name]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"expected a safetensors file with a float tensor {name}: {type(error).__name__} {error}"
        ) from error


def compressed(data: bytes) -> bytes:
    """`data` as one zstd frame. Readers here take it in the place of the file itself."""
    import pyarrow as pa

    return bytes(pa.Codec("zstd", compression_level=ZSTD_LEVEL).compress(data, asbytes=True))


def _plain(data: bytes) -> bytes:
    if not data.startswith(ZSTD):
        return data
    import pyarrow as pa

    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
        return bytes(stream.read())


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file as `safetensors_of` writes them, compressed or not: float32, or int64.

    ValueError where it is no such file.
    """
    try:
        data = _plain(data)
    except OSError as error:
        raise ValueError(f"expected a zstd frame: {error}") from error
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        body = memoryview(data)[8 + length :]
        return {name: _decoded(body, entry) for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected a safetensors file of float arrays: {type(error).__name__} {error}") from error


def read_metadata(data: bytes) -> dict[str, str]:
    """What the header of a safetensors file says beside its arrays."""
    data = _plain(data)
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))


def _encoded(name: str, array: np.ndarray, dtype: str) -> tuple[str, bytes]:
    """What safetensors calls the type of an array, and its bytes."""
    if array.dtype.kind in "bui":
        return "I64", np.ascontiguousarray(array, dtype="<i8").tobytes()
    values = np.ascontiguousarray(array, dtype="<f4")
    with np.errstate(over="ignore"):
        data, back = _cast(values, dtype)
    if not np.isfinite(back).all():
        raise ValueError(
            f"{name}: expected finite values that fit {dtype}, found a largest magnitude of {np.abs(values).max()}"
        )
    return SAFETENSORS[dtype], data


def _decoded(body: memoryview, entry: dict[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    raw, kind = body[start:end], entry["dtype"]
    if kind == "BF16":
        values = (np.frombuffer(raw, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    elif kind == "I64":
        values = np.frombuffer(raw, "<i8").astype(np.int64)
    else:
        values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)
    return values.reshape(entry["shape"])


def _cast(values: np.ndarray, dtype: str) -> tuple[bytes, np.ndarray]:
    """The bytes of float32 `values` in `dtype`, and what they read as."""
    if dtype == "float32":
        return values.tobytes(), values
    if dtype == "float16":
        half = values.astype("<f2")
        return half.tobytes(), half
    if dtype != "bfloat16":
        raise ValueError(f"tensor dtype: expected one of {sorted(SAFETENSORS)}, found {dtype!r}")
    bits = values.view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    rounded = np.where(np.isfinite(values), rounded, bits).astype("<u4")  # rounding must not carry a NaN into a number
    return (rounded >> np.uint32(16)).astype("<u2").tobytes(), rounded.view("<f4")
