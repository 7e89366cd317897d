"""Which samples meet an SQL condition, decided by DataFusion, the engine that comes with deltalake.

The condition is on the columns of `pipelines.decisions.DECIDED`, on `score.<name>`, a number for each score, and on
`extra.<name>` and `structured.<name>`, the text of a key of `extra_json` and of the caption of style `structured`:

    verdict = 'accepted' and score.prompt_match > 0.8 and label <> 'n'
    array_has(tags, 'faces') or (height >= 480 and created_at > '2026-01-01')

Names are in lower case, and quoted where they have other letters: score."prompt-match". A score or key that a sample does not
have is NULL, and meets nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from infra.errors import UserError
from pipelines.decisions import DECIDED
from pipelines.idset import IdSet

FIELD = re.compile(r"""\b(score|extra|structured)\s*(?:\.\s*(?:"([^"]+)"|(\w+))|\[\s*'([^']+)'\s*\])""")

Read = Callable[[list[str]], Iterator[pa.RecordBatch]]
"""Columns -> all samples with their decisions applied."""


def choose(read: Read, where: str) -> IdSet:
    """The ids of the samples that meet `where`. UserError where it is no condition on what there is.

    The columns that it names go through a table in a temporary folder, so memory does not grow with the dataset.
    """
    query = f"SELECT sample_id FROM samples WHERE (\n{where}\n)"
    with _answer(read, [where], query, f"where: {where!r}") as found:
        return IdSet([pa.array(batch.column(0)) for batch in found])


def evaluate(read: Read, expressions: list[str]) -> Iterator[pa.RecordBatch]:
    """The sample_id, and what each SQL expression gives, of all samples, in no order."""
    for expression in expressions:  # one by one, so that what is wrong can be named
        with _answer(lambda _: iter(()), [expression], _select([expression]), f"cap: {expression!r}") as found:
            list(found)
    with _answer(read, expressions, _select(expressions), f"cap: {', '.join(expressions)!r}") as found:
        yield from found


def _select(expressions: list[str]) -> str:
    return (
        "SELECT sample_id, "
        + ", ".join(f"(\n{text}\n) AS value_{at}" for at, text in enumerate(expressions))
        + " FROM samples"
    )


@contextlib.contextmanager
def _answer(read: Read, texts: list[str], query: str, what: str) -> Iterator[Iterator[pa.RecordBatch]]:
    """The engine's answer to a query of the columns that `texts` name; `what` begins the UserError where it has none."""
    from deltalake import DeltaTable, QueryBuilder, write_deltalake

    text = "\n".join(texts)
    columns = [name for name in DECIDED.names if re.search(rf"\b{name}\b", text)]
    fields = sorted({(match[0], next(filter(None, match[1:]))) for match in FIELD.findall(text)})
    view = _View(columns, fields)
    with tempfile.TemporaryDirectory(prefix="ditmill-") as folder:
        write_deltalake(folder, pa.RecordBatchReader.from_batches(view.schema, view.batches(read)))
        view.check_scores(what)
        try:
            yield map(pa.record_batch, QueryBuilder().register("samples", DeltaTable(folder)).execute(query))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{what}: {_explain(error)}") from error


class _View:
    """What a query can see: the columns that it names, and its scores and keys as a struct of each kind."""

    def __init__(self, columns: list[str], fields: list[tuple[str, str]]) -> None:
        self._columns = list(dict.fromkeys(["sample_id", *columns]))
        self._names = {kind: [name for its, name in fields if its == kind] for kind in dict(fields)}
        self._seen: set[str] = set()
        columns_of = [DECIDED.field(name) for name in self._columns]
        for kind, names in self._names.items():
            columns_of.append(pa.field(kind, pa.struct([(name, KINDS[kind][1]) for name in names])))
        self.schema = pa.schema(columns_of)

    def batches(self, read: Read) -> Iterator[pa.RecordBatch]:
        needed = [name for name in self._columns if name != "label"]
        needed += ["captions"] if "caption" in needed else []
        needed += [KINDS[kind][0] for kind in self._names]
        for batch in read(list(dict.fromkeys(needed))):
            columns = [batch.column(name) for name in self._columns]
            for kind, names in self._names.items():
                rows = [_FIELDS[kind](row) for row in batch.column(KINDS[kind][0]).to_pylist()]
                if kind == "score":
                    self._seen.update(*rows)
                columns.append(
                    pa.array([{name: row.get(name) for name in names} for row in rows], self.schema.field(kind).type)
                )
            yield pa.record_batch(columns, schema=self.schema)

    def check_scores(self, what: str) -> None:
        for name in self._names.get("score", ()):
            if self._seen and name not in self._seen:
                what = what.partition(":")[0]
                raise UserError(f"{what}: no sample has a score {name!r}; there are: {', '.join(sorted(self._seen))}")


def _texts(text: str | None) -> dict[str, str]:
    """Keys of a JSON object as text; none where it is no object."""
    try:
        said = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(said, dict):
        return {}
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items() if value is not None
    }


def _structured(captions: list[dict[str, Any]] | None) -> dict[str, str]:
    return _texts(next((item["text"] for item in captions or () if item["style"] == "structured"), None))


KINDS = {
    "score": ("scores", pa.float64()),
    "extra": ("extra_json", pa.string()),
    "structured": ("captions", pa.string()),
}
"""Of each kind of struct: the column that it is made from, and the type of its fields."""

_FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "score": lambda row: {item["name"]: item["value"] for item in row or ()},
    "extra": _texts,
    "structured": _structured,
}


def _explain(error: Exception) -> str:
    """The engine's words on one line, without what speaks of its inside or of lines that the user did not write."""
    if isinstance(error, ValueError):  # the query gave something else than ids
        return "expected one condition"
    text = " ".join(str(error).split())
    text = re.sub(r"^(.* caused by )?(Schema error|SQL error|Error during planning|Arrow error): ", "", text)
    text = re.sub(r'^ParserError\("(.*?)( at Line: .*)?"\)$', r"\1", text).replace("found: )", "found its end")
    if "No field named" in text:
        text = (
            text.partition(" Valid fields")[0]
            + f" The columns are: {', '.join(DECIDED.names)}, score.<name>, extra.<name>, structured.<name>"
        )
    return text or type(error).__name__
