"""Which samples a report shows, with their media made small enough to travel inside one page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from infra.storage import Storage
from pipelines.decisions import Decision
from pipelines.report_data import Facts, Snapshot
from pipelines.report_media import Media, show
from stages.annotate import caption_name

MAX_TEXT = 1000
"""Characters of a prompt or caption that a report shows."""

READERS = 8
MAX_SECONDS = 60.0
"""A page of large videos, whose copies take long to make, ends here: any beginning of the choice is spread evenly."""

CARD_BYTES = 6_000
"""What a card weighs in the page besides its media and its texts."""

COLUMNS = (
    "sample_id",
    "run_id",
    "recipe",
    "prompt",
    "source_prompt",
    "negative_prompt",
    "seed",
    "sample_index",
    "model",
    "plan_id",
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "fps",
    "media",
    "scores",
    "verdict",
    "reasons",
    "judge",
    "rubric",
    "caption",
    "captions",
    "tags",
    "cost",
    "created_at",
)


@dataclass(frozen=True)
class Tile:
    """One sample as the report shows it. Texts are the dataset's own and as hostile as their author: escape them."""

    sample_id: str
    verdict: str
    decided_by: str
    was: str
    prompt: str
    source_prompt: str
    negative_prompt: str
    captions: tuple[tuple[str, str], ...]
    scores: tuple[tuple[str, float], ...]
    reasons: tuple[str, ...]
    tags: tuple[str, ...]
    label: str
    seed: int
    facts: tuple[tuple[str, str], ...]
    width: int
    height: int
    created_at: datetime | None
    media: Media


def gallery(
    storage: Storage, snapshot: Snapshot, facts: Facts, decisions: Mapping[str, Decision], limit: int, max_bytes: int
) -> list[Tile]:
    """At most `limit` samples whose cards weigh at most `max_bytes` in the page, evenly chosen, oldest first.

    Half are accepted and half rejected, unless one side has fewer. Media larger than their share become smaller copies.
    """
    order = choose(facts.positions, limit)
    rows = snapshot.take(order, COLUMNS)
    share = max(1, max_bytes // max(1, len(order)) - CARD_BYTES)
    tiles: list[Tile] = []
    weight = 0
    with ThreadPoolExecutor(READERS) as pool:

        def make(position: int) -> Tile:
            row = rows[position]
            return _tile(row, decisions.get(row["sample_id"], Decision()), show(storage, row, share))

        until = time.monotonic() + MAX_SECONDS
        for chunk in _chunks(order, 2 * READERS):  # so that little is read in vain when the page is full
            if time.monotonic() > until:
                break
            for tile in pool.map(make, chunk):
                weight += CARD_BYTES + len(tile.media.uri) + _text_bytes(tile)
                if weight > max_bytes:
                    return _oldest_first(tiles)
                tiles.append(tile)
    return _oldest_first(tiles)


def choose(positions: Mapping[str, np.ndarray], limit: int) -> list[int]:
    """At most `limit` rows of all sides together, half of each where both have enough; any prefix is spread evenly."""
    counts = {side: len(rows) for side, rows in positions.items()}
    shares: dict[str, int] = {}
    left = limit
    for at, side in enumerate(sorted(counts, key=lambda side: counts[side])):
        shares[side] = min(counts[side], left // (len(counts) - at))
        left -= shares[side]
    ranked: list[tuple[float, int]] = []
    for side, share in shares.items():
        picked: np.ndarray | list[int] = (
            positions[side][[i * counts[side] // share for i in range(share)]] if share else []
        )
        ranked += [((rank + 0.5) / share, int(picked[at])) for rank, at in enumerate(_spread_order(share))]
    return [position for _, position in sorted(ranked)]


def _spread_order(n: int) -> list[int]:
    """0 ... n-1 by their reversed bits, so that each prefix is spread over the whole."""
    bits = max(1, (n - 1).bit_length())
    return sorted(range(n), key=lambda at: int(f"{at:0{bits}b}"[::-1], 2))


def _tile(row: dict[str, Any], decision: Decision, media: Media) -> Tile:
    captions = {caption_name(item): item["text"] for item in row["captions"] or ()}
    if row["caption"] and row["caption"] not in captions.values():
        captions = {"caption": row["caption"], **captions}
    scores = {item["name"]: item["value"] for item in row["scores"] or ()}
    scores.update(decision.scores)
    verdict = decision.verdict or row["verdict"] or ""
    shape = f"{row['width']}×{row['height']}" + (
        f", {row['num_frames']} frames at {row['fps']:g} fps" if row["num_frames"] > 1 else ""
    )
    seconds = sum(item["accelerator_seconds"] or 0.0 for item in row["cost"] or ())
    told = (
        ("seed", f"{row['seed']} · sample {row['sample_index']}"),
        ("shape", shape),
        ("model", row["model"]),
        ("sampler", f"{row['num_inference_steps']} steps · guidance {row['guidance_scale']:g}"),
        ("plan", row["plan_id"]),
        ("judge", " · ".join(text for text in (row["judge"], row["rubric"]) if text)),
        ("cost", f"{seconds:.3g} accelerator-seconds"),
        ("run", row["run_id"]),
        ("made", f"{row['created_at']:%Y-%m-%d %H:%M:%S} UTC" if row["created_at"] else ""),
    )
    return Tile(
        sample_id=row["sample_id"],
        verdict=verdict,
        decided_by=decision.decided_by,
        was=row["verdict"] if decision.verdict and decision.verdict != row["verdict"] else "",
        prompt=clamp(row["prompt"] or ""),
        source_prompt=clamp(row["source_prompt"] or "") if row["source_prompt"] != row["prompt"] else "",
        negative_prompt=clamp(row["negative_prompt"] or ""),
        captions=tuple((name, clamp(text)) for name, text in {**captions, **decision.captions}.items() if text),
        scores=tuple((name, float(value)) for name, value in scores.items() if value is not None),
        reasons=tuple(clamp(text, 200) for text in (decision.reasons if decision.verdict else row["reasons"] or ())),
        tags=tuple(dict.fromkeys((*(row["tags"] or ()), *decision.tags)))[:20],
        label=decision.label,
        seed=row["seed"],
        facts=tuple((name, clamp(str(value), 200)) for name, value in told if value),
        width=row["width"],
        height=row["height"],
        created_at=row["created_at"],
        media=media,
    )


def clamp(text: str, limit: int = MAX_TEXT) -> str:
    """At most `limit` characters, and how many there were."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _text_bytes(tile: Tile) -> int:
    from markupsafe import escape

    texts = (
        tile.prompt,
        tile.source_prompt,
        tile.negative_prompt,
        *(text for _, text in tile.captions),
        *tile.reasons,
        *tile.tags,
    )
    return sum(len(str(escape(text)).encode()) for text in texts)


def _oldest_first(tiles: Iterable[Tile]) -> list[Tile]:
    return sorted(tiles, key=lambda tile: (tile.created_at is not None and tile.created_at.timestamp(), tile.sample_id))


def _chunks(items: Sequence[int], n: int) -> Iterator[Sequence[int]]:
    for at in range(0, len(items), n):
        yield items[at : at + n]
