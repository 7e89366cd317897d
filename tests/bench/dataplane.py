"""What the data plane carries: the graph with models that do nothing beside a bare Ray Data pipeline.

    ditmill bench dataplane [--rows 1000 10000 100000] [--batch-size 1024]

Ours: plan, mailbox, two groups of actors, real WriteShards and real commits, a kilobyte of media a row. The baseline reads
the same prompts with Ray Data, maps three times (adding a kilobyte and what a judge and a captioner add) and writes Parquet;
it commits nothing and could not resume. Each runs in a process and a cluster of its own, and once before it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.support.meter import measure

TARGET = 0.5
WARM_ROWS = 64


def main() -> None:
    arguments = _arguments()
    if arguments.role:
        print(json.dumps(ROLES[arguments.role](Path(arguments.folder), arguments)))
        return
    found = []
    for rows in arguments.rows:
        folder = Path(tempfile.mkdtemp(prefix="ditmill-bench-", dir=arguments.folder))
        try:
            write_prompts(folder, rows)
            found.append(_compared(rows, {role: _measured(role, folder, arguments) for role in ROLES}))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    said = {"target": TARGET, "batch_size": arguments.batch_size, "found": found}
    print(json.dumps(said) if arguments.json else _table(found, arguments.batch_size, arguments.codec))


def write_prompts(folder: Path, rows: int) -> None:
    """The plan file that both sides read, and a small one to warm up with."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.enumeration import PLANNED
    from pipelines.identity import Shape, prompt_id
    from tests.bench.support.null_stages import SIDE

    (folder / "plans").mkdir()
    shape = Shape(SIDE, SIDE, 1, 1.0)
    for name, count in (("warm", WARM_ROWS), ("plan", rows)):
        made = []
        for at in range(count):
            text = f"{name} prompt number {at}"
            made.append(
                {
                    "prompt_id": prompt_id(text, shape=shape, seed=0),
                    "source_prompt": text,
                    "prompt": text,
                    "negative_prompt": "",
                    "variant": 0,
                    "height": shape.height,
                    "width": shape.width,
                    "num_frames": shape.num_frames,
                    "fps": shape.fps,
                    "extra_json": "{}",
                }
            )
        pq.write_table(pa.Table.from_pylist(made, PLANNED), folder / "plans" / f"{name}.parquet")


def ours(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from infra.ray_session import ray_session
    from infra.storage import Storage
    from pipelines.enumeration import Enumeration
    from pipelines.generate import Job, StopRequest, generate
    from pipelines.graph import worker_env
    from pipelines.placement import Compute, Group, place
    from pipelines.spec import Budget, Target
    from stages.write import GeneratorFacts, WriteShards
    from tests.bench.support import null_stages as null

    storage = Storage(str(folder))
    facts = GeneratorFacts("null", "0" * 64, "0" * 32, "{}", 1, 1.0)
    generating = (null.NullEncode(), null.NullSample(), null.NullDecode())

    def run(plan: str) -> dict[str, Any]:
        run_id = f"20260101t000000-{plan}"
        write = WriteShards(
            storage, run_id, "synthetic", (facts,), "{}", judge="null", rubric="null", code_version="bench"
        )
        judging = (null.NullScore(), null.NullJudge(), null.NullCaption(arguments.codec), write)
        enumeration = Enumeration(storage, f"plans/{plan}.parquet", 1, ("0" * 32,), "0" * 32)
        job = Job(
            storage=storage,
            run_id=run_id,
            enumeration=enumeration,
            batch_size=arguments.batch_size,
            seed=0,
            target=Target(),
            budget=Budget(),
            commit_every=2.0,
        )

        def groups() -> tuple[Group, ...]:
            return place(generating, judging, found, Compute(actors={"sample": 1, "judge": arguments.writers}))

        began = time.time()
        outcome = generate(job, groups, StopRequest(), lambda _: None)
        progress = outcome.progress
        return {
            "accepted": progress.accepted,
            "seconds": time.time() - began,
            "flowing_seconds": time.time() - progress.first_result,
            "flowing_rows": progress.accepted - progress.first_done,
        }

    with ray_session(None, worker_env(1)) as found:
        run("warm")
        measured = run("plan")
    assert measured["accepted"] == len(Enumeration(storage, "plans/plan.parquet", 1, ("0" * 32,), "0" * 32))
    return measured


def bare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from infra.ray_session import ray_session
    from pipelines.graph import worker_env

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"media": bytes(1024), "nfe": 1}

    def judge(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"sharpness": 1.0, "prompt_match": 0.9, "no_artefacts": 0.9, "verdict": "accepted"}

    def caption(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"caption": "nothing to be seen"}

    with ray_session(None, worker_env(1)):
        import ray.data

        def run(plan: str) -> float:
            began = time.time()
            dataset = ray.data.read_parquet(str(folder / "plans" / f"{plan}.parquet"))
            dataset.map(sample).map(judge).map(caption).write_parquet(str(folder / f"bare-{plan}"))
            return time.time() - began

        run("warm")
        return {"seconds": run("plan")}


ROLES = {"ours": ours, "baseline": bare}


def _measured(role: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.dataplane", "--role", role, "--folder", str(folder)]
    command += ["--batch-size", str(arguments.batch_size), "--writers", str(arguments.writers)]
    command += ["--codec", arguments.codec]
    run = measure(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if run.returncode:
        raise SystemExit(f"{role} ended with {run.returncode}")
    peaks: dict[str, float] = {}
    for process in run.processes:
        peaks[process.kind] = max(peaks.get(process.kind, 0.0), process.peak_mib)
    return {**json.loads(run.stdout), "cpu_seconds": run.cpu_seconds, "peak_mib": peaks}


def _compared(rows: int, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ours, bare = sides["ours"], sides["baseline"]
    flowing = ours["flowing_rows"] / ours["flowing_seconds"] if ours["flowing_rows"] else None
    rate = {"rate": rows / ours["seconds"], "flowing": flowing, "bare": rows / bare["seconds"]}
    return {"rows": rows, **rate, "ratio": bare["seconds"] / ours["seconds"], **sides}


def _table(found: list[dict[str, Any]], batch_size: int, codec: str) -> str:
    lines = [
        f"rows a second, models that do nothing, batches of {batch_size}, a kilobyte of media ({codec} codec)",
        f"{'rows':>10}{'ours: with actor start':>26}{'once flowing':>14}{'bare Ray Data':>15}{'ratio':>7}"
        f"{'peak MiB: driver':>18}{'stage actor':>13}",
    ]
    for row in found:
        peaks = row["ours"]["peak_mib"]
        flowing = f"{row['flowing']:.0f}" if row["flowing"] else "-"
        lines.append(
            f"{row['rows']:10,}{row['rate']:26.0f}{flowing:>14}{row['bare']:15.0f}{row['ratio']:7.2f}"
            f"{peaks['the process']:18.0f}{peaks['stage actors']:13.0f}"
        )
    largest = max(found, key=lambda row: row["rows"])
    met = "met" if largest["ratio"] >= TARGET else "MISSED"
    lines.append(f"target: at least {TARGET}x, actors' start included, at {largest['rows']:,} rows: {met}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000], help="sizes to measure")
    parser.add_argument("--batch-size", type=int, default=1024, help="rows in a batch of ours")
    parser.add_argument("--writers", type=int, default=2, help="actors of ours that judge, caption and write")
    parser.add_argument(
        "--codec", choices=["null", "png"], default="null", help="null: a kilobyte as it is; png: of noise"
    )
    parser.add_argument("--folder", default=None, help="where temporary datasets go")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
