"""One picture of a dataset, for a README or a terminal that shows no pages."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra.storage import Storage
from pipelines.decisions import read_decisions
from pipelines.gallery import READERS, choose
from pipelines.report_data import Facts, Snapshot, read_facts
from pipelines.report_media import still

GAP = 4
BACKGROUND = (24, 26, 27)
REJECTED = (224, 122, 63)
DIMMED = 0.45
COLUMNS = ("sample_id", "media", "height", "width", "num_frames")


def contact_sheet(storage: Storage, n: int = 64, side: int = 128) -> bytes:
    """A PNG of the middle frames of at most `n` samples, evenly chosen, the longer side of each `side` pixels.

    Accepted samples come first, then rejected ones, dimmed and with an orange corner.
    """
    snapshot = Snapshot(storage)
    return sheet_of(storage, snapshot, read_facts(snapshot, read_decisions(storage)), n, side)


def sheet_of(storage: Storage, snapshot: Snapshot, facts: Facts, n: int = 64, side: int = 128) -> bytes:
    """`contact_sheet` of tables that were read already."""
    from PIL import Image

    rejected = set(facts.positions["rejected"].tolist())
    order = sorted(choose(facts.positions, n), key=lambda position: (position in rejected, position))
    rows = snapshot.take(order, COLUMNS)
    across = max(1, math.ceil(math.sqrt(len(order))))
    down = max(1, math.ceil(len(order) / across))
    sheet = Image.new("RGB", (across * (side + GAP) + GAP, down * (side + GAP) + GAP), BACKGROUND)
    with ThreadPoolExecutor(READERS) as pool:
        stills = list(pool.map(lambda position: still(storage, rows[position], side), order))
    for at, (position, frame) in enumerate(zip(order, stills, strict=True)):
        if frame is None:
            continue
        picture = Image.fromarray(_dimmed(frame) if position in rejected else frame)
        scale = side / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
        line, column = divmod(at, across)
        left, top = GAP + column * (side + GAP), GAP + line * (side + GAP)
        sheet.paste(picture, (left + (side - width) // 2, top + (side - height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _dimmed(frame: np.ndarray) -> np.ndarray:
    marked = (frame * DIMMED).astype(np.uint8)
    height, width, _ = marked.shape
    rows, columns = np.mgrid[:height, :width]
    marked[(width - columns) + rows < max(3, min(height, width) // 5)] = REJECTED
    return marked
