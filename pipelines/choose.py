"""Which samples meet an SQL condition, decided by DataFusion, the engine that comes with deltalake.

The condition is on the columns of `pipelines.decisions.DECIDED`, and on `score.<name>`, a number for each score:

    verdict = 'accepted' and score.prompt_match > 0.8 and label <> 'n'
    array_has(tags, 'faces') or (height >= 480 and created_at > '2026-01-01')

Names are in lower case, and quoted where they have other letters: score."prompt-match". A score that a sample does not have
is NULL, and meets nothing.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator

import pyarrow as pa

from infra.errors import UserError
from pipelines.decisions import DECIDED
from pipelines.idset import IdSet

SCORE = re.compile(r"""\bscore\s*(?:\.\s*(?:"([^"]+)"|(\w+))|\[\s*'([^']+)'\s*\])""")

Read = Callable[[list[str]], Iterator[pa.RecordBatch]]
"""Columns -> all samples with their decisions applied."""


def choose(read: Read, where: str) -> IdSet:
    """The ids of the samples that meet `where`. UserError where it is no condition on what there is.

    The columns that it names go through a table in a temporary folder, so memory does not grow with the dataset.
    """
    from deltalake import DeltaTable, QueryBuilder, write_deltalake

    columns = [name for name in DECIDED.names if re.search(rf"\b{name}\b", where)]
    scores = sorted({next(filter(None, match)) for match in SCORE.findall(where)})
    view = _View(columns, scores)
    with tempfile.TemporaryDirectory(prefix="ditmill-") as folder:
        write_deltalake(folder, pa.RecordBatchReader.from_batches(view.schema, view.batches(read)))
        view.check_scores()
        query = f"SELECT sample_id FROM samples WHERE (\n{where}\n)"
        try:
            found = QueryBuilder().register("samples", DeltaTable(folder)).execute(query)
            return IdSet([pa.array(batch.column(0)) for batch in map(pa.record_batch, found)])
        except Exception as error:
            raise UserError(f"where: {where!r}: {_explain(error)}") from error


class _View:
    """What the condition can see: the columns that it names, and its scores as one struct."""

    def __init__(self, columns: list[str], scores: list[str]) -> None:
        self._columns = list(dict.fromkeys(["sample_id", *columns]))
        self._scores = scores
        self._seen: set[str] = set()
        fields = [DECIDED.field(name) for name in self._columns]
        if scores:
            fields.append(pa.field("score", pa.struct([(name, pa.float64()) for name in scores])))
        self.schema = pa.schema(fields)

    def batches(self, read: Read) -> Iterator[pa.RecordBatch]:
        needed = [name for name in self._columns if name != "label"]
        needed += ["captions"] if "caption" in needed and "captions" not in needed else []
        needed += ["scores"] if self._scores and "scores" not in needed else []
        for batch in read(needed):
            columns = [batch.column(name) for name in self._columns]
            if self._scores:
                columns.append(self._struct(batch.column("scores")))
            yield pa.record_batch(columns, schema=self.schema)

    def check_scores(self) -> None:
        for name in self._scores:
            if self._seen and name not in self._seen:
                raise UserError(f"where: no sample has a score {name!r}; there are: {', '.join(sorted(self._seen))}")

    def _struct(self, scores: pa.Array) -> pa.Array:
        rows = [{item["name"]: item["value"] for item in row or ()} for row in scores.to_pylist()]
        self._seen.update(*rows)
        return pa.array(
            [{name: row.get(name) for name in self._scores} for row in rows], self.schema.field("score").type
        )


def _explain(error: Exception) -> str:
    """The engine's words on one line, without what speaks of its inside or of lines that the user did not write."""
    if isinstance(error, ValueError):  # the query gave something else than ids
        return "expected one condition"
    text = " ".join(str(error).split())
    text = re.sub(r"^(.* caused by )?(Schema error|SQL error|Error during planning|Arrow error): ", "", text)
    text = re.sub(r'^ParserError\("(.*?)( at Line: .*)?"\)$', r"\1", text).replace("found: )", "found its end")
    if "No field named" in text:
        text = text.partition(" Valid fields")[0] + f" The columns are: {', '.join(DECIDED.names)}, score.<name>"
    return text or type(error).__name__
