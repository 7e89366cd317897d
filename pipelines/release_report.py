"""The page of a release that was held to rules: what was removed as near-duplicates, with pictures, and what by caps.

Like the dataset's report it asks the network for nothing and runs no script.
"""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Storage
from pipelines.idset import IdSet
from pipelines.repack import File, Hashed
from pipelines.report import plain, templates
from pipelines.report_media import still

if TYPE_CHECKING:
    from pipelines.release import Snapshot
    from pipelines.select import Selected

READERS = 8
SIDE = 128
COLUMNS = ["sample_id", "verdict", "media", "height", "width", "num_frames", "prompt"]


def write_report(storage: Storage, snapshot: Snapshot, selected: Selected, name: str, path: str) -> File:
    """Write the page of the release `name`, and say what was written."""
    page = _render(selected.said, _pictures(storage, snapshot, selected.shown), name)
    with storage.writing(path) as target:
        hashed = Hashed(target)
        hashed.write(page.encode())
    return hashed.entry(path)


def _render(said: dict[str, Any], pictures: dict[str, dict[str, str]], name: str) -> str:
    from markupsafe import Markup

    style = resources.files("pipelines").joinpath("report.css").read_text(encoding="utf-8")
    return (
        templates()
        .get_template("release_report.html")
        .render(
            name=name,
            said=said,
            rules=plain(said["rules"]),
            near=said.get("near_duplicates"),
            caps=said.get("caps") or (),
            topics={str(topic["topic"]): topic["like"] for topic in said.get("topics") or ()},
            picture=lambda sample_id: pictures.get(sample_id, {"uri": "", "prompt": ""}),
            style=Markup(style),
        )
    )


def _pictures(storage: Storage, snapshot: Snapshot, shown: dict[str, str]) -> dict[str, dict[str, str]]:
    """Of each sample a small picture as a data URI, '' where there is none to show, and its prompt."""
    rows: list[dict[str, Any]] = []
    ours = [sample_id for sample_id, release in shown.items() if not release]
    for batch, _ in snapshot.chosen(IdSet([pa.array(ours, pa.string())]), COLUMNS) if ours else ():
        rows += batch.to_pylist()
    for release in sorted({release for release in shown.values() if release}):
        wanted = [sample_id for sample_id, where in shown.items() if where == release]
        for file in storage.files(f"releases/{release}", recursive=False):
            if file.endswith(".parquet"):
                data = io.BytesIO(storage.read_bytes(file))
                rows += pq.read_table(data, columns=COLUMNS, filters=[("sample_id", "in", wanted)]).to_pylist()
    with ThreadPoolExecutor(READERS) as pool:
        uris = pool.map(lambda row: _uri(storage, row), rows)
        return {
            row["sample_id"]: {"uri": uri, "prompt": (row["prompt"] or "")[:300]}
            for row, uri in zip(rows, uris, strict=True)
        }


def _uri(storage: Storage, row: dict[str, Any]) -> str:
    from PIL import Image

    frame = still(storage, row, SIDE)
    if frame is None:
        return ""
    picture = Image.fromarray(frame)
    picture.thumbnail((2 * SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
