"""A dataset of moving shapes, written the way a run writes one, and a headless browser to look at its report with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra import schema
from infra.commit import Committer, write_part
from infra.media import encode, preview_strip
from infra.shard import build_tar
from infra.storage import Storage
from infra.tables import Table

START = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)
COLOURS = {
    "red": (214, 69, 65),
    "blue": (58, 120, 214),
    "green": (76, 168, 96),
    "yellow": (233, 190, 72),
    "white": (236, 236, 236),
}
GROUNDS = ((22, 24, 30), (238, 236, 228), (52, 60, 84), (40, 70, 60))
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("bouncing", "drifting left", "spinning", "rising")


@dataclass(frozen=True)
class Made:
    """What `make_dataset` is asked for."""

    accepted: int = 6
    rejected: int = 3
    failures: int = 2
    num_frames: int = 17
    side: int = 64
    prompts: tuple[str, ...] = ()
    annotations: tuple[tuple[str, str, str, str], ...] = ()  # sample_id, kind, name, value
    keep_rejected: str = "preview"
    runs: bool = True
    command: str = "ditmill run quickstart.yaml --set output.storage=https://me:hunter2@store"
    spec: dict[str, Any] = field(default_factory=dict)


def sample_id(number: int) -> str:
    return f"{number * 2654435761 % 2**32:08x}".ljust(32, "0")


def frames(number: int, num_frames: int, side: int, still: bool = False) -> np.ndarray:
    """[T, H, W, 3] uint8: a shape that moves over a plain ground."""
    colour = list(COLOURS.values())[number % len(COLOURS)]
    shape, ground = SHAPES[number % len(SHAPES)], GROUNDS[number % len(GROUNDS)]
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    out = np.empty((num_frames, side, side, 3), np.uint8)
    for at in range(num_frames):
        turn = 0.0 if still else at / max(1, num_frames)
        x = side * (0.5 + 0.28 * np.sin(2 * np.pi * (turn + number / 7)))
        y = side * (0.5 + 0.28 * np.cos(2 * np.pi * (2 * turn + number / 5)))
        dx, dy, radius = columns - x, rows - y, side * 0.17
        inside = {
            "circle": dx**2 + dy**2 < radius**2,
            "square": (abs(dx) < radius) & (abs(dy) < radius),
            "triangle": (dy < radius) & (dy > 2 * abs(dx) - radius),
        }[shape]
        out[at] = np.where(inside[..., None], colour, ground)
    return out


def _append(storage: Storage, table: str, rows: list[dict[str, Any]]) -> None:
    committer = Committer(Table(storage, table), rows[0].get("run_id") or "run-test")
    name = f"{table}/part-{committer.run_id}-{len(Table(storage, table).files())}.parquet"
    committer.commit([write_part(storage, name, pa.Table.from_pylist(rows, schema=schema.TABLES[table]))])


def make_dataset(root: Path, made: Made = Made()) -> Storage:
    """A dataset of two runs under `root`, with media in tars and rows in tables."""
    storage = Storage(str(root))
    rng = np.random.default_rng(0)
    total = made.accepted + made.rejected
    rejected = (
        {int(at) for at in np.linspace(1, max(1, total - 1), made.rejected).round()}
        if made.accepted
        else set(range(total))
    )
    storage.write_bytes(
        "dataset.json", json.dumps({"name": root.name, "recipe": "synthetic", "schema_version": 1}).encode()
    )
    halves = [list(range(total * 2 // 3)), list(range(total * 2 // 3, total))]
    for number, members in enumerate(halves):
        run_id = f"20260314-0926{number}-{'ab'[number]}{number}f4"
        start = START + timedelta(hours=20 * number)
        rows = [_sample(made, at, at in rejected, run_id, start, rng) for at in members]
        for prefix, wanted in (("media", "accepted"), ("rejected", "rejected")):
            chosen = [(row, encoded) for row, encoded in rows if row["verdict"] == wanted and encoded is not None]
            _write_shard(storage, f"{prefix}/{run_id}/shard-{number:05d}.tar", chosen)
        if rows:
            _append(storage, "samples", [row for row, _ in rows])
        if made.runs:
            _append(storage, "runs", [*_run_rows(made, run_id, start, [row for row, _ in rows], number, root.name)])
    if made.failures:
        _append(storage, "failures", [_failure(at) for at in range(made.failures)])
    for at, (which, kind, name, value) in enumerate(made.annotations):  # one commit each: the latest wins
        row = {"sample_id": which, "kind": kind, "name": name, "value": value, "annotator": "a person"}
        _append(storage, "annotations", [{**row, "run_id": f"note-{at}", "created_at": START}])
    return storage


def _sample(
    made: Made, at: int, rejected: bool, run_id: str, start: datetime, rng: np.random.Generator
) -> tuple[dict[str, Any], Any]:
    shape, colour, motion = SHAPES[at % len(SHAPES)], list(COLOURS)[at % len(COLOURS)], MOTIONS[at // 3 % len(MOTIONS)]
    prompt = made.prompts[at] if at < len(made.prompts) else f"a {colour} {shape} {motion} over a plain dark background"
    static = rejected and at % 2 == 0
    pixels = frames(at, made.num_frames, made.side, still=static)
    scores = {"sharpness": rng.normal(420, 60), "brightness": rng.normal(90, 20)}
    if made.num_frames > 1:
        scores |= {
            "motion": 0.0 if static else rng.gamma(4, 0.4),
            "flicker": rng.gamma(2, 0.3),
            "static": float(static),
        }
    reasons = ["static: no frame differs from the first"] if static else []
    if not static:
        low = rejected and made.accepted
        scores |= {
            "prompt_match": float(rng.beta(2, 4) * 0.5 if low else 0.55 + 0.45 * rng.beta(5, 2)),
            "no_artefacts": float(rng.beta(8, 2)),
        }
        reasons = [f"prompt_match {scores['prompt_match']:.2f} < 0.55"] if rejected else []
    if not rejected:
        encoded = encode(pixels, 8.0)
    else:
        encoded = preview_strip(pixels) if made.keep_rejected == "preview" else None
    text = f"A {colour} {shape} is {motion}."
    dense = (
        f"On a plain, evenly lit background a flat {colour} {shape} keeps {motion} at an even pace; nothing else moves."
    )
    seconds = {
        "encode": 0.03,
        "sample": 1.1,
        "decode": 0.18,
        "score": 0.02,
        "judge": 0.21,
        "caption": 0.35,
        "write": 0.01,
    }
    skipped = ("judge", "caption") if static else ("caption",) if rejected else ()
    row = dict.fromkeys(schema.SAMPLES.names)
    row |= {
        "sample_id": sample_id(at),
        "noise_key": "00" * 16,
        "run_id": run_id,
        "recipe": "synthetic",
        "prompt_id": f"{at:032x}",
        "source_prompt": f"a {colour} {shape}",
        "prompt": prompt,
        "negative_prompt": "",
        "sample_index": 0,
        "seed": 0,
        "inputs": [],
        "model": "pack://tiny",
        "model_sha256": "ab" * 32,
        "adapters": [],
        "plan_id": "c0ffee" * 5,
        "plan_json": "{}",
        "layout_json": "{}",
        "num_inference_steps": 20,
        "guidance_scale": 5.0,
        "nfe": 40,
        "height": made.side,
        "width": made.side,
        "num_frames": made.num_frames,
        "fps": 8.0,
        "media": [],
        "tensors": [],
        "scores": [{"name": name, "value": float(value)} for name, value in scores.items()],
        "verdict": "rejected" if rejected else "accepted",
        "reasons": reasons,
        "judge": "pack://tiny",
        "rubric": "default",
        "caption": "" if rejected else text,
        "captions": []
        if rejected
        else [
            {"style": style, "language": "en", "scene": 0, "text": words, "model": "pack://tiny"}
            for style, words in (("short", text), ("dense", dense))
        ],
        "tags": ["demo"],
        "split": "train",
        "parent_ids": [],
        "round": 0,
        "cost": [
            {"stage": stage, "accelerator_seconds": value * rng.uniform(0.9, 1.1), "cpu_seconds": value * 1.02}
            for stage, value in seconds.items()
            if stage not in skipped
        ],
        "node": "node-1",
        "device": "cpu",
        "code_version": "0.1.0",
        "created_at": start + timedelta(seconds=1.9 * at + 12 * (at // 16)),
        "extra_json": "{}",
    }
    return row, encoded


def _write_shard(storage: Storage, name: str, chosen: list[tuple[dict[str, Any], Any]]) -> None:
    if not chosen:
        return
    members = [(f"{row['sample_id']}.{encoded.suffix}", encoded.data) for row, encoded in chosen]
    data, places = build_tar(members)
    storage.write_bytes(name, data)
    for (row, encoded), (member, _) in zip(chosen, members, strict=True):
        offset, nbytes = places[member]
        kind = "video" if encoded.suffix == "mp4" else "image"
        row["media"] = [
            {
                "role": "preview" if row["verdict"] == "rejected" else kind,
                "shard": name,
                "member": member,
                "offset": offset,
                "nbytes": nbytes,
                "mime": encoded.mime,
                "codec": encoded.codec,
                "sha256": "00" * 32,
            }
        ]


def _run_rows(
    made: Made, run_id: str, start: datetime, rows: list[dict[str, Any]], number: int, name: str
) -> Iterator[dict[str, Any]]:
    spent = sum(cost["accelerator_seconds"] for row in rows for cost in row["cost"])
    overhead = {"boot": 3.1, "load": 11.1, "idle": 6.5, "unshared": 0.4, "tail": 0.7}
    spec = {
        "name": name,
        "recipe": "synthetic",
        "judge": {
            "backend": "transformers",
            "model": "pack://tiny",
            "rubric": "default",
            "thresholds": {"prompt_match": 0.55},
        },
        "score": {"min_motion": 0.1, "max_motion": None},
        "sampler": {"scheduler": "unipc", "num_inference_steps": 20, "guidance_scale": 5.0},
        "generators": [{"model": "pack://tiny"}],
        **made.spec,
    }
    base: dict[str, Any] = {
        "run_id": run_id,
        "command": made.command,
        "spec_json": json.dumps(spec),
        "planned": 1000,
        "versions_json": json.dumps({"ditmill": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "diffusers": "0.42.1"}),
        "hosts_json": json.dumps([{"host": "node-1", "cpus": 2, "gpus": 0}]),
        "licences_json": json.dumps([{"name": "apache-2.0", "may_train": "yes", "why": "permissive licence"}]),
        "reproducible": "bitwise",
    }
    yield {**base, "event": "started", "status": "running", "created_at": start}
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("accepted", "rejected")}
    yield {
        **base,
        **counts,
        "event": "ended",
        "status": "reached",
        "failed": made.failures,
        "planned_through": made.accepted + made.rejected + made.failures,
        "allocated_accelerator_seconds": spent + sum(overhead.values()),
        "overhead_json": json.dumps(overhead),
        "created_at": start + timedelta(seconds=60 + 2 * len(rows)),
    }


def _failure(at: int) -> dict[str, Any]:
    error_type, stage, error = (
        ("nan_latents", "sample", "latents: expected finite values, found 64 NaN; lower guidance_scale or use float32"),
        ("empty_prompt", "encode", "prompt: expected text, found none"),
    )[at % 2]
    return {
        "sample_id": f"fa11{at:028x}",
        "attempt": 0,
        "prompt_id": f"{at:032x}",
        "prompt": "" if at % 2 else "a red circle that is not a number",
        "sample_index": 0,
        "stage": stage,
        "error_type": error_type,
        "error": error,
        "cost": [{"stage": "sample", "accelerator_seconds": 0.2, "cpu_seconds": 0.2}],
        "run_id": "20260314-09260-a0f4",
        "node": "node-1",
        "created_at": START,
    }


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Storage]:
    """Makes a dataset: `dataset(accepted=4, prompts=("...",))`; the arguments are those of `Made`."""

    def build(**asked: Any) -> Storage:
        return make_dataset(tmp_path_factory.mktemp("shapes"), Made(**asked))

    return build


GENERATED: dict[str, Any] = {
    "name": "generated",
    "prompts": {"inline": [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog")]},
    "buckets": [{"height": 32, "width": 32, "num_frames": 5}],
    "generators": [{"model": "pack://tiny"}],
    "sampler": {"num_inference_steps": 2},
    "layout": {"batch_size": 3},
    "judge": {"model": "pack://tiny"},
    "caption": {"model": "pack://tiny", "styles": ["short"], "max_new_tokens": 8},
    "output": {"keep_rejected": "latents", "tensors": {"latents": "float32"}},
}
"""Two batches of the tiny pack's videos, a second each. Its judge accepts four of the six."""


@pytest.fixture(scope="session")
def generated_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that the stages made, in this process and without Ray."""
    return make_generated(tmp_path_factory.mktemp("generated") / "dataset", GENERATED)


@pytest.fixture(scope="session")
def generate_from(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a dataset as the stages make it: `generate_from(prompts={"path": ...})`; sections replace those of GENERATED."""

    def build(**sections: Any) -> Path:
        return make_generated(tmp_path_factory.mktemp("generated") / "dataset", {**GENERATED, **sections})

    return build


def make_generated(root: Path, spec: dict[str, Any]) -> Path:
    """Run the stages of a spec one after the other."""
    from infra.control import sweep
    from pipelines.commits import Commits
    from pipelines.enumeration import Batches
    from pipelines.recipes import RECIPES
    from pipelines.resolve import resolve_spec
    from pipelines.run import expand, open_dataset
    from pipelines.run_rows import commit_run_row
    from pipelines.spec import parse_spec
    from stages.actor import run_stage

    run = resolve_spec(parse_spec({**spec, "output": {**spec["output"], "uri": str(root)}}))
    open_dataset(run)
    enumeration, _ = expand(run, lambda: ())
    ids = json.dumps({"generator_ids": run.generator_ids, "plan_id": run.plan.plan_id})
    known = {"plan_file": enumeration.plan_file, "planned": len(enumeration), "extra_json": ids}
    commit_run_row(run, "started", status="running", **known)
    commits = Commits(run.storage, run.run_id, 0.0, "text_embeddings" in run.spec.output.tensors)
    todo = Batches(enumeration, lambda ids: np.zeros(len(ids), bool), run.spec.layout.batch_size, {}, run.spec.seed)
    recipe = RECIPES[run.spec.recipe]
    for number, batch in enumerate(todo):
        batch["batch_index"][:] = number
        for stage in (*recipe.generating(run), *recipe.judging(run)):
            stage.load()
            batch, _ = run_stage(stage, batch)
        commits.add(json.loads(batch["result"][0])["parts"])
        commits.commit(force=True)
    ended = {"allocated_accelerator_seconds": 1.0, "planned_through": len(enumeration)}
    commit_run_row(run, "ended", status="exhausted", **known, **ended)
    sweep(run.storage, run.run_id)
    return root


@pytest.fixture
def generated(generated_once: Path, tmp_path: Path) -> Callable[..., Any]:
    """A copy of that dataset, and its resolved spec: `generated(judge={"thresholds": {...}})` changes sections."""
    from pipelines.resolve import resolve_spec
    from pipelines.spec import parse_spec

    root = tmp_path / "dataset"
    shutil.copytree(generated_once, root)

    def resolve(**sections: dict[str, Any]) -> Any:
        spec = {**GENERATED, "output": {**GENERATED["output"], "uri": str(root)}}
        for name, changes in sections.items():
            spec[name] = {**spec.get(name, {}), **changes}
        return resolve_spec(parse_spec(spec))

    return resolve
