"""Batches of a release for one rank: shuffled, without end, and the same from any step on.

Rows are shuffled in a window that slides over the release; tensors are read when a sample is drawn. To go on from a step is
to draw as many rows again and to read nothing.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from infra.errors import UserError
from models.accelerate.registry import TECHNIQUES
from pipelines.samples import StoredSample, Trajectory

AHEAD = 4
"""Batches that are read while the student trains."""

Samples = Callable[[], Iterator[StoredSample]]
"""The samples of one rank, from the first."""


@dataclass(frozen=True)
class Wanted:
    """What a method reads of a sample."""

    model_sha256: str
    guidance_scale: float
    shift: float | None
    """Of the scheduler."""
    text_length: int
    """Tokens that embeddings are padded to with zeros, as the teacher saw them."""
    places: tuple[int, ...] | None
    """States of the path, 0 first; None for none."""
    steps: int = 0
    """Of the teacher, the last place."""
    negative: bool = False
    """Embeddings of negative prompts too."""
    shape: tuple[int, ...] | None = None
    """Of latents, where texts alone are read: noise and latents are zeros. None where they are read too."""
    media: tuple[int, ...] | None = None
    """Height, width and frames of all rows; None for those that the latents say."""
    sampled: Mapping[str, Any] | None = None
    """What else of the plan makes other samples, as `sampled` says it; None for anything."""


def drawn(samples: Samples, split: str, seed: int, window: int) -> Iterator[StoredSample]:
    """Samples of a split in random order, epoch after epoch; each once an epoch."""
    epoch = 0
    while True:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1, epoch])))
        waiting: list[StoredSample] = []
        found = False
        for sample in samples():
            if sample.row["split"] != split:
                continue
            found = True
            waiting.append(sample)
            if len(waiting) > window:
                yield _take(waiting, rng)
        while waiting:
            yield _take(waiting, rng)
        if not found:
            raise UserError(
                f"--release: it has no samples of split {split} for one of the processes; make a larger one"
            )
        epoch += 1


def _take(waiting: list[StoredSample], rng: np.random.Generator) -> StoredSample:
    at = int(rng.integers(len(waiting)))
    waiting[at], waiting[-1] = waiting[-1], waiting[at]
    return waiting.pop()


def batches(order: Iterator[StoredSample], wanted: Wanted, size: int, skipped: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches after the first `skipped`, each read by a thread while those before it are used: see `read`."""
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    ended = threading.Event()

    def work() -> None:
        try:
            for _ in range(skipped * size):
                next(order)
            while not ended.is_set():
                put(read([next(order) for _ in range(size)], wanted))
        except BaseException as error:
            put(error)

    def put(item: Any) -> None:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    threading.Thread(target=work, name="read batches", daemon=True).start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()


def read(samples: Sequence[StoredSample], wanted: Wanted) -> dict[str, np.ndarray]:
    """noise, latents [B, *latent_shape], prompt_embeds [B, text_length, width], and if wanted negative_embeds, as these, and
    states [B, S, *latent_shape]; all float32. UserError where a sample is not the teacher's or lacks any of them."""
    columns: dict[str, list[np.ndarray]] = {}
    for sample in samples:
        check_row(sample.row, wanted)
        path = None if wanted.places is None else sample.trajectory()
        ends = path is not None and path.places[-1] == path.steps
        if wanted.shape is None:
            one = {"noise": sample.noise(), "latents": path.states[-1] if path and ends else sample.latents()}
        else:
            one = dict.fromkeys(("noise", "latents"), np.zeros(wanted.shape, np.float32))
        one["prompt_embeds"] = padded(sample.text()["prompt_embeds"], wanted.text_length)
        if wanted.negative:
            one["negative_embeds"] = padded(sample.negative_text()["prompt_embeds"], wanted.text_length)
        if path is not None:
            one["states"] = states(path, one, wanted)
        for name, value in one.items():
            columns.setdefault(name, []).append(value)
    shapes = {value.shape for value in columns["latents"]}
    if len(shapes) > 1:
        raise UserError(
            f"--release: its latents have several shapes ({', '.join(map(str, sorted(shapes)))}); make a release of one"
        )
    return {name: np.stack(values) for name, values in columns.items()}


def check_row(row: Mapping[str, Any], wanted: Wanted) -> None:
    """UserError where a sample is not of the one teacher, or was not made as the others were."""
    plan, who = _plan(row["plan_json"] or "{}"), f"--release: {row['sample_id']}"
    if row["model_sha256"] != wanted.model_sha256:
        raise UserError(
            f"{who} was made by another model ({row['model']}); a student has one teacher: make a release of its samples"
            " alone, --where \"model_sha256 = '...'\""
        )
    if row["adapters"] or plan.get("teacher"):
        also = "a teacher's first steps (teacher_steps)" if plan.get("teacher") else "adapters"
        raise UserError(f"{who} was sampled with {also}; a student has one teacher: make a release of samples without")
    media = (row["height"], row["width"], row["num_frames"])
    if wanted.media not in (None, media):
        raise UserError(f"{who} is of {_by(media)}, others of {_by(wanted.media)}; make a release of one shape")
    asked = {"guidance_scale": wanted.guidance_scale, "shift": wanted.shift, "max_sequence_length": wanted.text_length}
    found = {name: plan.get(name) for name in asked} | {"guidance_scale": row["guidance_scale"]}
    if wanted.sampled is not None:
        asked |= wanted.sampled
        found |= sampled(row)
    if found != asked:
        raise UserError(
            f"{who} was sampled with {found}, others with {asked}; a student learns one of them: make a release of one"
            " plan, --where \"plan_id = '...'\""
        )


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


@lru_cache(maxsize=256)
def _plan(plan_json: str) -> dict[str, Any]:
    return dict(json.loads(plan_json))


def states(trajectory: Trajectory, ends: dict[str, np.ndarray], wanted: Wanted) -> np.ndarray:
    """The states at the wanted places; the first and the last are the noise and the latent even if they were not kept."""
    kept = dict(zip(trajectory.places, trajectory.states, strict=True))
    kept.setdefault(0, ends["noise"])
    kept.setdefault(trajectory.steps, ends["latents"])
    places = wanted.places or ()
    if trajectory.steps != wanted.steps or not kept.keys() >= set(places):
        raise UserError(
            f"trajectory.places: expected states {list(places)} of {wanted.steps} steps, found {sorted(kept)} of"
            f" {trajectory.steps}; choose places that are kept, or a release of one plan"
        )
    return np.stack([kept[place] for place in places])


def padded(embeds: np.ndarray, length: int) -> np.ndarray:
    """[length, width] of [tokens, width]: cut, or filled with zeros."""
    embeds = embeds[:length]
    return np.pad(embeds, ((0, length - len(embeds)), (0, 0))).astype(np.float32)


def sampled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Sigmas that a row's plan gives, and techniques that make something else of its guidance; None for none."""
    plan = _plan(row["plan_json"]).get("plan", {})
    techniques = [json.loads(item) for item in plan.get("accelerate") or ()]
    guidance = [item for item in techniques if TECHNIQUES[item["technique"]].decides == "guidance"]
    return {"sigmas": plan.get("sigmas"), "accelerate": guidance or None}


def text_length(row: Mapping[str, Any]) -> int:
    """Tokens that a row's sample was conditioned on."""
    return int(_plan(row["plan_json"])["max_sequence_length"])
