"""One warning a run for words that a generator cannot know, because its tokenizer has no token for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Storage
from infra.telemetry import log
from models.vocabulary import may_not_know, unknown_words
from pipelines.resolve import Resolved

CHUNK = 8192
NAMED = 20
"""Words that a warning names; the rest are counted."""


def warn_of_unknown_words(run: Resolved, plan_file: str) -> None:
    """Log what `unknown_lines` finds in the prompts of a plan file."""
    for line in unknown_lines(run, _prompts(run.storage, plan_file)):
        log().warning(line)


def unknown_lines(run: Resolved, prompts: Iterable[pa.Array]) -> list[str]:
    """One line for each generator that does not know some words of `prompts`, arrays of text; it names them."""
    if not any(may_not_know(ref.path) for ref in run.generators):
        return []
    words: dict[str, None] = {}
    for texts in prompts:
        split = pc.list_flatten(pc.utf8_split_whitespace(texts))
        words |= dict.fromkeys(split.unique().to_pylist())
    lines = []
    for ref, fact in zip(run.generators, run.facts, strict=True):
        unknown = unknown_words(ref.path, words)
        if unknown:
            more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
            lines.append(
                f"{fact.model} does not know these words of the prompts, and takes them all for one: "
                f"{', '.join(map(repr, unknown[:NAMED]))}{more}; say it in other words, or use another model"
            )
    return lines


def _prompts(storage: Storage, plan_file: str) -> Iterator[pa.Array]:
    with pq.ParquetFile(pa.BufferReader(storage.read_bytes(plan_file))) as file:
        for batch in file.iter_batches(CHUNK, columns=["prompt"]):
            yield batch.column("prompt")
