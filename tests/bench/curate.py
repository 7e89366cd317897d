"""Curating a folder with planted flaws: what is found, how right captions are, clips a second, and memory.

    ditmill bench curate [--clips 2000] [--seed 0] [--records 2000 20000] [--skip-run]

models.pack.planted makes the folder. Precision and recall are by flaw: of clean-looking flaws by what the dataset says of a
file, of duplicates by what a release without near-duplicates leaves out. Captions are held against the oracle. The baseline
is one process with one loop over the same steps (open, look, score, judge, caption, encode, write), without tables and Ray;
two runs of different length tell what one more clip costs, apart from starting and loading.
Memory is that of the driver alone: it plans and enumerates records of a table of that many clips.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa

from infra.commit import Committer, write_part
from infra.media import decode
from infra.members import read_member
from infra.schema import PROMPTS, SOURCES
from infra.storage import Storage
from infra.tables import Table
from models.pack.oracle import match, read
from models.pack.phrases import parse
from models.pack.planted import FLAWS, Truth, plant
from pipelines.dedup import RecordReport
from pipelines.enumeration import Batches, Enumeration
from pipelines.identity import Shape, clip_id, source_id
from pipelines.idset import IdSet
from pipelines.indexing import indexing_of, planned
from pipelines.plan_file import write_plan
from pipelines.recipes import curate
from pipelines.release import Snapshot
from pipelines.resolve import Resolved, resolve_spec
from pipelines.rules import Rules
from pipelines.select import select
from pipelines.spec import load_spec
from stages.actor import run_stage
from stages.batch import Batch, jsons, load_json, texts
from stages.look import CUT_FROM

REPO = Path(__file__).parents[2]
SPEC = REPO / "pipelines" / "examples" / "curate.yaml"
WANTED = 1.6
"""Clips a second on two cores, by those of the loop."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="ditmill bench curate", description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=2000, help="planted files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--records", type=int, nargs="*", default=[2000, 20_000], help="clips whose planning is measured"
    )
    parser.add_argument("--skip-run", action="store_true", help="measure memory alone")
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plan is not None:
        print(json.dumps(_plan_records(asked.plan)))
        return
    for count in asked.records:
        out = subprocess.run(
            [sys.executable, "-m", "tests.bench.curate", "--plan", str(count)],
            check=True,
            capture_output=True,
            text=True,
        )
        found = json.loads(out.stdout.splitlines()[-1])
        print(
            f"driver, {count:>6} clips: {found['peak_mib']:.0f} MiB at the peak, {found['grown_mib']:.1f} of them since start"
        )
    if not asked.skip_run:
        _measure(asked.clips, asked.seed)


def _measure(clips: int, seed: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ditmill-curate-"))
    try:
        truths = plant(folder / "planted", clips, seed)
        overrides = [f"sources.0.path={folder}/planted/clips", f"output.uri={folder}/made", "compute.actors.judge=2"]
        bare = _loop(resolve_spec(load_spec(SPEC, [*overrides, f"output.uri={folder}/bare"])), folder)
        few = clips // 4
        some = _run([*overrides, f"output.uri={folder}/few", f"sources.0.limit={few}"])
        seconds = _run(overrides)
        rate = (clips - few) / (seconds - some)
        storage = Storage(f"{folder}/made")
        for flaw, (found, there) in _found(storage, truths).items():
            both = len(found & there)
            precision, recall = both / max(1, len(found)), both / max(1, len(there))
            print(
                f"{flaw:<12} precision {precision:.3f}  recall {recall:.3f}  ({len(there)} planted, {len(found)} found)"
            )
        right, written = _captions(storage)
        print(f"captions right by the oracle: {right} of {written} ({right / max(1, written):.3f})")
        print(f"loop in one process: {clips / bare:.2f} clips/s ({bare:.1f} s, models loaded)")
        print(
            f"ditmill run:         {rate:.2f} clips/s at the margin: {few} in {some:.0f} s, {clips} in {seconds:.0f} s"
        )
        print(f"ratio {rate * bare / clips:.2f} (wanted {WANTED})")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(overrides: list[str]) -> float:
    """Seconds of a whole `ditmill run`."""
    command = [sys.executable, "-m", "flows.cli", "run", str(SPEC), "--json"]
    began = time.perf_counter()
    sets = [word for each in overrides for word in ("--set", each)]
    subprocess.run([*command, *sets], check=True, capture_output=True, text=True, cwd=REPO)
    return time.perf_counter() - began


def _found(storage: Storage, truths: list[Truth]) -> dict[str, tuple[set[str], set[str]]]:
    """By flaw: the files that the dataset says have it, and those that do."""
    there = {flaw: {Path(truth.file).name for truth in truths if truth.flaw == flaw} for flaw in FLAWS}
    says: dict[str, set[str]] = {flaw: set() for flaw in FLAWS}
    said = {"static": "frozen", "motion": "frozen", "flicker": "flickering", "brightness": "dark"}
    least = load_spec(SPEC).clip.caption_match
    rows = Table(storage, "samples").read(["sample_id", "inputs", "reasons", "verdict", "scores"]).to_pylist()
    named = {row["sample_id"]: Path(row["inputs"][0]["uri"]).name for row in rows}
    for row in rows:
        name = named[row["sample_id"]]
        first = (row["reasons"] or [""])[0].split()
        flaw = "duplicated" if first[:1] == ["duplicate"] else said.get(first[0].rstrip(":") if first else "")
        if flaw:
            says[flaw].add(name)
        scores = {score["name"]: score["value"] for score in row["scores"]}
        if row["verdict"] == "accepted" and scores.get("caption_match", 1.0) < least:
            says["mislabelled"].add(name)
    for row in Table(storage, "sources").read(["uri", "prompt_ids", "dropped"]).to_pylist():
        if len(row["prompt_ids"]) + len(row["dropped"]) > 1:
            says["cut"].add(Path(row["uri"]).name)
    says["mislabelled"] -= there["cut"]  # one of their shots has the other's caption
    says["duplicated"] |= _copies(storage, named)
    for truth in truths:  # of two that are the same, either may stay
        copy, like = Path(truth.file).name, Path(truth.duplicate_of or "").name
        if like in says["duplicated"] and copy not in says["duplicated"]:
            says["duplicated"] = says["duplicated"] - {like} | {copy}
    return {flaw: (says[flaw], there[flaw]) for flaw in FLAWS}


def _copies(storage: Storage, named: dict[str, str]) -> set[str]:
    """Files whose bytes were there before, and those that a release without near-duplicates leaves out."""
    kept = {Path(row["inputs"][0]["uri"]).name for row in Table(storage, "prompts").read(["inputs"]).to_pylist()}
    sources = Table(storage, "sources").read(["uri", "error_type"]).to_pylist()
    copies = {name for row in sources if not row["error_type"] and (name := Path(row["uri"]).name) not in kept}
    snapshot = Snapshot(storage)
    accepted = pa.array(
        [row["sample_id"] for batch in snapshot.batches(["sample_id", "verdict"]) for row in batch.to_pylist()
         if row["verdict"] == "accepted"],
        pa.string(),
    )  # fmt: skip
    rules = Rules.model_validate({"near_duplicates": {"hash": 6}, "keep": {}})
    stays = select(storage, snapshot, IdSet([accepted]), rules, lambda done, total: None).ids
    left_out = [
        name for name, stay in zip(accepted.to_pylist(), stays.contains(accepted.to_pylist()), strict=True) if not stay
    ]
    return copies | {named[sample_id] for sample_id in left_out}


def _captions(storage: Storage) -> tuple[int, int]:
    """Accepted clips whose caption the oracle sees in them, and all that have one."""
    right = written = 0
    for row in Table(storage, "samples").read(["verdict", "caption", "media"]).to_pylist():
        if row["verdict"] == "accepted" and row["caption"]:
            written += 1
            scene = parse(row["caption"])
            clip = decode(read_member(storage, row["media"][0]), "mp4")
            right += scene is not None and all(match(read(clip), scene).values())
    return right, written


def _loop(run: Resolved, folder: Path) -> float:
    """Seconds of one process that does to each file what a run does, models loaded before."""
    index = indexing_of(run)
    *stages, _ = (*curate.generating(run), *curate.judging(run))
    for stage in (index, *stages):
        stage.load()
    files = sorted((folder / "planted" / "clips").glob("*.mp4"))
    (folder / "bare").mkdir()
    size = run.spec.layout.batch_size
    began = time.perf_counter()
    waiting: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for clip in (clip for file in files for clip in _clips(index, file)):
        group = waiting.setdefault(tuple(clip["shape"]), [])
        group.append(clip)
        if len(group) == size:
            _through(stages, waiting.pop(tuple(clip["shape"])), folder)
    for group in waiting.values():
        _through(stages, group, folder)
    return time.perf_counter() - began


def _clips(index: Any, file: Path) -> Iterator[dict[str, Any]]:
    beside = [str(path) for path in [file.with_suffix(".txt")] if path.exists()]
    source = {"uri": str(file), "caption": "", "sidecars": beside, "caption_key": "caption", "error": ""}
    out, _ = run_stage(index, {"source": jsons([source]), **_blank(1), "sample_id": texts([file.name])})
    said = load_json(out["index"])[0] if not out["error_type"][0] else {}
    for at, clip in enumerate(said.get("clips", ())):
        facts = {**said["probe"], "turned": False, "nbytes": said["nbytes"], "crop": clip["crop"]}
        place = {"uri": str(file), "sha256": said["sha256"], "start": clip["start"], "end": clip["end"]}
        shape = [clip["height"], clip["width"], clip["num_frames"]]
        yield {"id": f"{file.stem}-{at}", "inputs": [place], "extra": {CUT_FROM: facts}, "fps": clip["fps"], "shape": shape,
               "caption": said["caption"]}  # fmt: skip


def _through(stages: list[Any], clips: list[dict[str, Any]], folder: Path) -> None:
    batch: Batch = {
        "sample_id": texts([clip["id"] for clip in clips]),
        "prompt": texts([clip["caption"] for clip in clips]),
        "inputs": jsons([clip["inputs"] for clip in clips]),
        "extra": jsons([clip["extra"] for clip in clips]),
        "fps": np.array([clip["fps"] for clip in clips]),
        **{
            name: np.array([clip["shape"][at] for clip in clips])
            for at, name in enumerate(("height", "width", "num_frames"))
        },
        **_blank(len(clips)),
    }
    for stage in stages:
        batch, _ = run_stage(stage, batch)
    for at, verdict in enumerate(batch["verdict"]):
        if verdict == "accepted":
            (folder / "bare" / f"{batch['sample_id'][at]}.mp4").write_bytes(batch["encoded"][at].data)
            (folder / "bare" / f"{batch['sample_id'][at]}.json").write_text(batch["captions"][at])


def _blank(count: int) -> Batch:
    return {name: texts([""] * count) for name in ("error_type", "error", "error_stage")}


def _plan_records(count: int) -> dict[str, float]:
    """What a driver takes that plans `count` clips and hands all of them out."""
    folder = tempfile.mkdtemp(prefix="ditmill-curate-")
    try:
        run = resolve_spec(load_spec(SPEC, [f"output.uri={folder}", "judge={backend: none}", "caption=null"]))
        for first in range(0, count, 1000):
            _write_records(run, first, min(1000, count - first))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        listed = IdSet([pa.array([source_id(f"/c/{at}.mp4", "") for at in range(count)])])
        plan_file = write_plan(run, planned(run, listed, RecordReport()))
        enumeration = Enumeration(run.storage, plan_file, 1, run.generator_ids, run.plan_id)
        batches = Batches(enumeration, lambda ids: np.zeros(len(ids), bool), 16, {}, 0)
        assert sum(len(batch["sample_id"]) for batch in batches) == count
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_mib": peak / 1024, "grown_mib": (peak - before) / 1024}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_records(run: Resolved, first: int, count: int) -> None:
    clips, sources = [], []
    for at in range(first, first + count):
        shape, uri = Shape(64, 64, 17, 8.0), f"/c/{at}.mp4"
        prompt_id = clip_id(f"{at:064x}", 0.0, 2.125, shape)
        place = {"role": "video", "uri": uri, "sha256": f"{at:064x}", "start": 0.0, "end": 2.125}
        text = f"a caption of about the length that captions of clips have, number {at}"
        clips.append({"prompt_id": prompt_id, "source_prompt": text, "prompt": text, "negative_prompt": "", "variant": 0,
                      "inputs": [place], "height": 64, "width": 64, "num_frames": 17, "fps": 8.0, "seed": 0, "tags": [],
                      "extra_json": "{}"})  # fmt: skip
        sources.append({"source_id": source_id(uri, ""), "uri": uri, "prompt_ids": [prompt_id]})
    for name, rows, schema in (("prompts", clips, PROMPTS), ("sources", sources, SOURCES)):
        part = write_part(run.storage, f"{name}/{run.run_id}-{first:08d}.parquet", pa.Table.from_pylist(rows, schema))
        Committer(Table(run.storage, name), run.run_id).commit([part])


if __name__ == "__main__":
    main()
