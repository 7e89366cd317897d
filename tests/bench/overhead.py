"""What Ray, Prefect, the tables and the checks cost: `ditmill run` beside a hand-written single-process loop.

    ditmill bench overhead [--samples 128] [--steps 20] [--batch-size 16]

Both make the same samples of pack://tiny, from the same noise, at the same batch size and threads, and the clips' bytes are
compared. Every process is counted. Start-up (up to loaded models) and closing (verify, card, report, shutting down) come
once a run, whatever its size, and are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.storage import Storage
from infra.tables import Table
from tests.bench.support.meter import Measured, measure

SHAPES = ("circle", "square", "triangle", "star", "ball", "cube", "cloud", "fish")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
MOTIONS = ("bouncing", "rotating", "sliding", "falling")
TARGET = 1.10


@dataclass(frozen=True)
class Share:
    """CPU-seconds of one side: before models are loaded, between, and after the last commit; and the wall time between."""

    startup: float
    steady: float
    closing: float
    wall: float
    by_kind: dict[str, float]

    def a_sample(self, samples: int) -> float:
        return self.steady / samples


def main() -> None:
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="ditmill-bench-", dir=arguments.folder))
    try:
        ours, theirs, same = compare(folder, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    ratio = ours.a_sample(arguments.samples) / theirs.a_sample(arguments.samples)
    found = {
        "samples": arguments.samples,
        "same_clips": same,
        "ours": ours.__dict__,
        "baseline": theirs.__dict__,
        "cpu_ratio": ratio,
        "wall_ratio": ours.wall / theirs.wall,
        "target": TARGET,
    }
    print(json.dumps(found) if arguments.json else _table(found))


def compare(folder: Path, arguments: argparse.Namespace) -> tuple[Share, Share, int]:
    """Ours, the baseline, and how many clips have the same bytes in both."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "MKL_CBWR": "AUTO,STRICT",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path.cwd()),
    }
    spec = folder / "spec.json"
    spec.write_text(json.dumps(_spec(folder, arguments)))
    run = measure([sys.executable, "-m", "flows.cli", "run", str(spec), "--json"], env=env)
    if run.returncode:
        raise SystemExit(f"ditmill run ended with {run.returncode}")
    storage = Storage(str(folder / "ours"))
    rows = Table(storage, "samples").read().to_pylist()
    place = {prompt: at for at, prompt in enumerate(_prompts(arguments.samples))}
    rows.sort(key=lambda row: place[row["prompt"]])
    job = folder / "job.json"
    job.write_text(json.dumps(_job(folder, arguments, rows)))
    loop = measure([sys.executable, "-m", "tests.bench.support.plain_loop", str(job)], env=env)
    if loop.returncode:
        raise SystemExit(f"the plain loop ended with {loop.returncode}")
    said = json.loads(loop.stdout)
    same = sum(ours["media"][0]["sha256"] == theirs["sha256"] for ours, theirs in zip(rows, said["rows"], strict=True))
    return _our_share(run, storage), _share(loop, {}, said["loaded"], said["ended"]), same


def _our_share(run: Measured, storage: Storage) -> Share:
    """Each actor starts up until its models are loaded, everything else until the first actor can sample."""
    row = next(row for row in Table(storage, "runs").read().to_pylist() if row["event"] == "ended")
    actors = json.loads(row["extra_json"])["actors"]
    loaded = {
        int(actor["actor"].rpartition("-")[2]): actor["started_at"] + actor["boot_seconds"] + actor["load_seconds"]
        for actor in actors
    }
    first = min(
        loaded[int(actor["actor"].rpartition("-")[2])] for actor in actors if actor["group"] in ("encode", "sample")
    )
    return _share(run, loaded, first, row["created_at"].timestamp())


def _share(run: Measured, loaded: dict[int, float], first: float, ended: float) -> Share:
    startup = sum(process.cpu_at(loaded.get(process.pid, first)) for process in run.processes)
    until = run.cpu_at(ended)
    by_kind: dict[str, float] = {}
    for process in run.processes:
        seconds = process.cpu_at(ended) - process.cpu_at(loaded.get(process.pid, first))
        by_kind[process.kind] = by_kind.get(process.kind, 0.0) + seconds
    by_kind = dict(sorted(by_kind.items(), key=lambda item: -item[1]))
    return Share(startup, until - startup, run.cpu_seconds - until, ended - first, by_kind)


def _spec(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "name": "overhead",
        "prompts": {"inline": _prompts(arguments.samples)},
        "generators": [{"model": "pack://tiny"}],
        "sampler": {"scheduler": "unipc", "num_inference_steps": arguments.steps},
        "layout": {"batch_size": arguments.batch_size, "threads": arguments.threads},
        # Every sample is accepted, so that both sides caption and keep all of them.
        "score": {"reject_static": False, "reject_duplicates": False},
        "judge": {"thresholds": {"prompt_match": 0, "no_artefacts": 0, "motion_smooth": 0}},
        "output": {"uri": str(folder / "ours"), "marked": False},
    }


def _job(folder: Path, arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plain loop is told: the same models, sizes, texts and noise."""
    from models.source import resolve
    from pipelines.spec import parse_spec
    from stages.caption import INSTRUCTIONS
    from stages.rubric import load_rubric

    spec = parse_spec(_spec(folder, arguments))
    assert spec.caption is not None
    bucket = spec.buckets[0]
    return {
        "out": str(folder / "baseline"),
        "generator": resolve("pack://tiny", "generator"),
        "judge": resolve("pack://tiny", "judge"),
        "threads": arguments.threads,
        "batch_size": arguments.batch_size,
        "height": bucket.height,
        "width": bucket.width,
        "num_frames": bucket.num_frames,
        "fps": bucket.fps,
        "num_inference_steps": spec.sampler.num_inference_steps,
        "guidance_scale": spec.sampler.guidance_scale,
        "max_sequence_length": json.loads(rows[0]["plan_json"])["max_sequence_length"],
        "num_frames_shown": spec.judge.num_frames,
        "questions": [question.text.replace("{media}", "video") for question in load_rubric("default").questions],
        "instructions": [INSTRUCTIONS[style].format(media="video") for style in spec.caption.styles],
        "max_new_tokens": spec.caption.max_new_tokens,
        "samples": [{name: row[name] for name in ("sample_id", "noise_key", "prompt")} for row in rows],
    }


def _prompts(count: int) -> list[str]:
    made = [f"a {colour} {shape} {motion}" for motion in MOTIONS for colour in COLOURS for shape in SHAPES]
    return [made[at % len(made)] + (f" {at // len(made)}" if at >= len(made) else "") for at in range(count)]


def _table(found: dict[str, Any]) -> str:
    samples = found["samples"]
    lines = [
        f"{samples} samples of pack://tiny (random weights); {found['same_clips']} clips have the same bytes in both"
    ]
    lines.append(f"{'':34}{'ditmill run':>14}{'plain loop':>14}{'ratio':>8}")
    for name, key, digits, each in (
        ("CPU-seconds a sample", "steady", 4, samples),
        ("wall-seconds a sample", "wall", 4, samples),
        ("start-up, CPU-seconds", "startup", 1, 1),
        ("closing, CPU-seconds", "closing", 1, 1),
    ):
        ours, theirs = found["ours"][key] / each, found["baseline"][key] / each
        ratio = f"{ours / theirs:8.2f}" if key in ("steady", "wall") else ""
        lines.append(f"{name:34}{ours:14.{digits}f}{theirs:14.{digits}f}{ratio}")
    lines.append(
        "ours, CPU-seconds between start-up and closing: "
        + ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in found["ours"]["by_kind"].items() if seconds >= 0.05)
    )
    met = found["cpu_ratio"] <= found["target"]
    lines.append(f"target: at most {found['target']:.2f}x CPU-seconds a sample: {'met' if met else 'MISSED'}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="samples, each of a prompt of its own")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--batch-size", type=int, default=16, help="samples denoised together")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, on both sides")
    parser.add_argument("--folder", default=None, help="where temporary datasets go")
    parser.add_argument("--keep", action="store_true", help="keep them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
