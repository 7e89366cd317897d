"""Columns of Parquet as `datasets` types them, written without it.

It finds its types in two places of a file's schema: arrays of a fixed shape are Arrow extension types (name and shape in the
field's metadata, lists of lists as storage), and the types Image and Video stand in JSON under the key `huggingface`. Readers
that know neither see plain lists and structs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

Row = Mapping[str, Any]


class Feature(Protocol):
    """A column's type."""

    def field(self, name: str) -> pa.Field: ...

    def hub(self) -> dict[str, Any] | None:
        """As `datasets` writes it in JSON; None where it follows from the Arrow type."""

    def column(self, values: Sequence[Any]) -> pa.Array: ...


@dataclass(frozen=True)
class Plain:
    """What Arrow has a type for."""

    type: pa.DataType

    def field(self, name: str) -> pa.Field:
        return pa.field(name, self.type)

    def hub(self) -> dict[str, Any] | None:
        return None

    def column(self, values: Sequence[Any]) -> pa.Array:
        return pa.array(values, self.type)


@dataclass(frozen=True)
class Media:
    """`Image` or `Video`: an encoded file, as {bytes, path}."""

    kind: str

    def field(self, name: str) -> pa.Field:
        return pa.field(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))

    def hub(self) -> dict[str, Any] | None:
        return {"_type": self.kind}

    def column(self, values: Sequence[Any]) -> pa.Array:
        return pa.array(values, self.field("").type)


@dataclass(frozen=True)
class Array:
    """`Array2D` to `Array5D`: numpy arrays of one shape. The first axis of any length is None."""

    shape: tuple[int | None, ...]
    dtype: str

    def field(self, name: str) -> pa.Field:
        storage = pa.from_numpy_dtype(self.dtype)
        for _ in self.shape:
            storage = pa.list_(storage)
        extension = {
            "ARROW:extension:name": f"datasets.features.features.Array{len(self.shape)}DExtensionType",
            "ARROW:extension:metadata": json.dumps([self.shape, self.dtype]),
        }
        return pa.field(name, storage, metadata=extension)

    def hub(self) -> dict[str, Any] | None:
        return {"shape": list(self.shape), "dtype": self.dtype, "_type": f"Array{len(self.shape)}D"}

    def column(self, values: Sequence[np.ndarray]) -> pa.Array:
        nested = pa.array(np.concatenate([value.reshape(-1) for value in values]).astype(self.dtype, copy=False))
        for length in reversed(self.shape[1:]):
            nested = pa.ListArray.from_arrays(np.arange(0, len(nested) + 1, length, dtype=np.int32), nested)
        ends = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
        return pa.ListArray.from_arrays(ends, nested)


def schema_of(features: Mapping[str, Feature]) -> pa.Schema:
    """The schema of a file with these columns."""
    told = {name: hub for name, feature in features.items() if (hub := feature.hub()) is not None}
    metadata = {"huggingface": json.dumps({"info": {"features": told}})} if told else None
    return pa.schema([feature.field(name) for name, feature in features.items()], metadata=metadata)


def table_of(rows: Sequence[Row], features: Mapping[str, Feature]) -> pa.Table:
    """Rows as a table of `schema_of`."""
    columns = [feature.column([row[name] for row in rows]) for name, feature in features.items()]
    return pa.Table.from_arrays(columns, schema=schema_of(features))
