"""A table of uris with captions: CSV, JSONL or Parquet, a row a file."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from pipelines.record_fields import clean, clean_text, is_absent, tags_field, text_field
from pipelines.record_files import read_rows
from pipelines.sources.item import Item, Place


def items(place: Place) -> Iterator[Item]:
    """Its rows, in order. A relative uri starts at the table's folder; other columns pass through.

    Raises UserError for a table without such a column, and for a uri or caption that is no text.
    """
    source = place.source
    for row in read_rows(source.path, key=f"{place.key}.path", column=source.column, storage=place.settings):
        fields = {name: value for name, value in (row.fields or {}).items() if not is_absent(value)}
        if source.column not in fields:
            continue
        uri, spoilt = clean_text(text_field(row.place, source.column, fields.pop(source.column)))
        licence = "licence" if "licence" in fields else "license"
        yield Item(
            uri if "://" in uri else posixpath.join(row.folder, uri),
            caption=clean_text(text_field(row.place, source.caption, fields.pop(source.caption, "")))[0],
            tags=tags_field(row.place, fields.pop("tags", ())),
            licence=clean_text(text_field(row.place, licence, fields.pop(licence, "")))[0],
            extra={clean_text(str(name))[0]: clean(value) for name, value in fields.items()},
            error=f"{row.place}: {source.column}: expected UTF-8, found other bytes; mend that row" if spoilt else "",
        )
