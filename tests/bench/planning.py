"""How long a resume takes to find what is left to do among ten million committed samples, and in how much memory.

    ditmill bench planning [--samples 10000000]

Ours: `IdSet` over the committed ids, and the enumeration walked until the first batch that has work. The baseline walks the
same enumeration against a Python set of the same ids. Each runs in a process of its own. The dataset is synthetic: real
parts and a real log, with nothing in them but ids.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.commit import Committer, Part
from infra.schema import SAMPLES
from infra.storage import Storage
from infra.tables import Table
from pipelines.enumeration import PLANNED, Batches, Enumeration
from pipelines.idset import IdSet

PER_PROMPT = 100
LEFT = 1000
MOST_SECONDS, MOST_GB = 60.0, 4.0


def main() -> None:
    arguments = _arguments()
    if arguments.side:
        print(json.dumps(_walk(arguments.folder, arguments.samples, arguments.side)))
        return
    folder = tempfile.mkdtemp(prefix="ditmill-bench-")
    try:
        _make(folder, arguments.samples)
        sides = {side: _measure(folder, arguments.samples, side) for side in ("ours", "baseline")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(sides) if arguments.json else _table(arguments.samples, sides))


def _make(folder: str, samples: int) -> None:
    """Prompts, and committed samples for all of the enumeration but its last LEFT."""
    storage = Storage(folder)
    prompts = samples // PER_PROMPT
    Path(folder, "plans").mkdir(parents=True)
    random = np.random.default_rng(0)
    ids = [random.bytes(16).hex() for _ in range(prompts)]
    columns = {field.name: pa.nulls(prompts, field.type) for field in PLANNED}
    shape = {"height": 64, "width": 64, "num_frames": 17, "fps": 8.0, "seed": 0, "variant": 0}
    columns |= {name: pa.array([value] * prompts, PLANNED.field(name).type) for name, value in shape.items()}
    columns |= {"prompt_id": pa.array(ids), "prompt": pa.array([f"prompt {at}" for at in range(prompts)])}
    pq.write_table(pa.table(columns, PLANNED), storage.path("plans/p.parquet"))
    committer = Committer(Table(storage, "samples"), "bench")
    done, parts = 0, []
    waiting: list[str] = []
    for chunk in _enumeration(storage).chunks():
        waiting += chunk.sample_ids[: max(0, samples - LEFT - chunk.start)]
        last = chunk.start + len(chunk.sample_ids) >= samples
        while len(waiting) >= 1_000_000 or (last and waiting):
            part, waiting = waiting[:1_000_000], waiting[1_000_000:]
            rows = {field.name: pa.nulls(len(part), field.type) for field in SAMPLES} | {"sample_id": pa.array(part)}
            path = f"samples/bench-{len(parts):08d}.parquet"
            pq.write_table(pa.table(rows, SAMPLES), storage.path(path), compression="zstd")
            parts.append(Part(path, Path(storage.path(path)).stat().st_size, len(part)))
            done += len(part)
    committer.commit(parts)


def _enumeration(storage: Storage) -> Enumeration:
    return Enumeration(storage, "plans/p.parquet", PER_PROMPT, ("generator",), "plan")


def _walk(folder: str, samples: int, side: str) -> dict[str, float]:
    """Seconds to load the committed ids and to reach the end of the enumeration, and the process's peak memory."""
    storage = Storage(folder)
    began = time.perf_counter()
    columns = (batch.column("sample_id") for batch in Table(storage, "samples").batches(["sample_id"]))
    is_done: Callable[[list[str]], np.ndarray]
    if side == "ours":
        is_done = IdSet(columns).contains
    else:
        known = {sample_id for column in columns for sample_id in column.to_pylist()}

        def is_done(ids: list[str]) -> np.ndarray:
            return np.array([sample_id in known for sample_id in ids])

    loaded = time.perf_counter()
    batches = Batches(_enumeration(storage), is_done, 16, {}, 0)
    found = sum(len(batch["sample_id"]) for batch in batches)
    assert found == LEFT and batches.planned_through == samples, (found, batches.planned_through)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"load": loaded - began, "walk": time.perf_counter() - loaded, "gigabytes": peak}


def _measure(folder: str, samples: int, side: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "tests.bench.planning",
        "--side",
        side,
        "--folder",
        folder,
        "--samples",
        str(samples),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _table(samples: int, sides: dict[str, dict[str, float]]) -> str:
    lines = [f"{samples:,} committed samples, {LEFT} left to do", f"{'':34}{'ours':>10}{'a set':>10}{'ratio':>8}"]
    totals = {side: found | {"seconds": found["load"] + found["walk"]} for side, found in sides.items()}
    for name, key in (
        ("seconds to load the ids", "load"),
        ("seconds to walk the enumeration", "walk"),
        ("seconds in all", "seconds"),
        ("peak memory, GB", "gigabytes"),
    ):
        ours, theirs = totals["ours"][key], totals["baseline"][key]
        lines.append(f"{name:34}{ours:10.2f}{theirs:10.2f}{ours / theirs:8.2f}")
    met = totals["ours"]["seconds"] <= MOST_SECONDS and totals["ours"]["gigabytes"] <= MOST_GB
    lines.append(
        f"target: under {MOST_SECONDS:.0f} s and {MOST_GB:.0f} GB for 10,000,000: {'met' if met else 'MISSED'}"
    )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000, help="committed samples")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--side", choices=("ours", "baseline"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
