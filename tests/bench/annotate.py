"""What judging stored samples again costs: `ditmill annotate --judge` beside the bare judge on the same clips.

    ditmill bench annotate [--samples 1024] [--seed 0] [--gpu]

Rendered clips of the shapes world, stored as a run would have stored them. The baseline reads the same members, decodes them
and asks the same model the same questions, one batch after the other in one process. Accelerator-seconds: on a CPU those of
the one actor that judges. Starting workers and loading models come once and are told apart. With --gpu Ray is told of a GPU
that is not there, so that the graph is that of a machine with one: another process reads, and the judge's alone is counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import ray

from infra.commit import Committer, write_part
from infra.media import decode, encode
from infra.ray_session import Cluster, ray_session
from infra.schema import SAMPLES
from infra.shard import build_tar
from infra.storage import Storage
from infra.tables import Table
from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack.grammar import sample_scenes
from models.pack.phrases import describe
from models.pack.train.loop import stream
from models.pack.world import render
from models.source import resolve
from pipelines.annotate import rejudge
from pipelines.decisions import read_decisions
from pipelines.graph import worker_env
from pipelines.resolve import Resolved, resolve_spec
from pipelines.run import open_dataset
from pipelines.spec import parse_spec

BATCH, PART = 16, 128
MOST = 1.1


def main() -> None:
    import torch

    torch.set_num_threads(1)
    options = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="ditmill-bench-"))
    try:
        run = _stored(folder, options.samples, options.seed)
        bare, reading, expected = _bare(run)
        allocated, overhead, found = _annotated(run, options.gpu)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    once = overhead["boot"] + overhead["load"]
    furthest = max(abs(found[key][name] - value) for key, row in expected.items() for name, value in row.items())
    print(f"{options.samples} clips of {len(next(iter(expected.values())))} questions, accelerator-seconds")
    print(f"{'bare judge':28}{bare:8.1f}")
    print(f"{'  with reading and decoding':28}{bare + reading:8.1f}")
    print(f"{'annotate, workers at work':28}{allocated - once:8.1f}{(allocated - once) / bare:8.2f}x the bare judge")
    print(f"{'':28}{'':8}{(allocated - once) / (bare + reading):8.2f}x with reading and decoding")
    print(f"{'  starting, loading':28}{once:8.1f}  once a run")
    print(f"of it, to no sample: {', '.join(f'{name} {seconds:.1f}' for name, seconds in overhead.items())}")
    print(f"largest difference of a probability: {furthest:.1e}")
    print(f"target: {MOST:g}x the bare judge: {'met' if allocated - once <= MOST * bare else 'MISSED'}")


def _stored(folder: Path, samples: int, seed: int) -> Resolved:
    """A dataset of accepted clips, by its resolved spec."""
    spec = {
        "prompts": {"inline": ["a red circle"]},
        "layout": {"batch_size": BATCH},
        "score": {"reject_static": False, "reject_duplicates": False},
        "output": {"uri": str(folder / "data")},
    }
    run = resolve_spec(parse_spec(spec))
    open_dataset(run)
    rng = stream(seed, 9_100_000)
    committer = Committer(Table(run.storage, "samples"), run.run_id)
    for start in range(0, samples, PART):
        scenes = sample_scenes(rng, min(PART, samples - start))
        clips = render(scenes, range(start, start + len(scenes)))
        ids = [hashlib.md5(f"{seed}/{start + at}".encode()).hexdigest() for at in range(len(scenes))]
        members = [(f"{key}.mp4", encode(clip, 8.0).data) for key, clip in zip(ids, clips, strict=True)]
        data, places = build_tar(members)
        shard = f"media/{run.run_id}/{start}.tar"
        run.storage.write_bytes(shard, data)
        rows = [
            _row(run, key, describe(scene, rng), {"shard": shard, "member": name, **_place(places[name], content)})
            for key, scene, (name, content) in zip(ids, scenes, members, strict=True)
        ]
        part = write_part(run.storage, f"samples/{run.run_id}-{start}.parquet", pa.Table.from_pylist(rows, SAMPLES))
        committer.commit([part])
    return run


def _place(place: tuple[int, int], content: bytes) -> dict[str, Any]:
    return {"offset": place[0], "nbytes": place[1], "sha256": hashlib.sha256(content).hexdigest()}


def _row(run: Resolved, key: str, prompt: str, media: dict[str, Any]) -> dict[str, Any]:
    shape = {"num_frames": 17, "height": 64, "width": 64, "fps": 8.0}
    row = {"sample_id": key, "run_id": run.run_id, "prompt": prompt, "verdict": "accepted", "scores": [], **shape}
    return row | {"media": [{"role": "video", "mime": "video/mp4", **media}], "cost": []}


def _bare(run: Resolved) -> tuple[float, float, dict[str, dict[str, float]]]:
    """Seconds of the judge, seconds of reading and decoding, and the answers."""
    judge = Multimodal(MultimodalRef(resolve("pack://shapes", "judge")))
    judge.p_yes(np.zeros((1, 2, 64, 64, 3), np.uint8), [["Is this a warm-up?"]])
    rows = Table(run.storage, "samples").read(["sample_id", "prompt", "media"]).to_pylist()
    asking = reading = 0.0
    found = {}
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        began = time.perf_counter()
        frames = np.stack([decode(_member(run.storage, row["media"][0]), "mp4") for row in some])
        read = time.perf_counter()
        questions = [[each.format(row["prompt"], frames.shape[1]) for each in run.rubric.questions] for row in some]
        p_yes = judge.p_yes(evenly_spaced(frames, run.spec.judge.num_frames), questions)
        reading, asking = reading + read - began, asking + time.perf_counter() - read
        names = [each.name for each in run.rubric.questions]
        found |= {
            row["sample_id"]: dict(zip(names, p.tolist(), strict=True)) for row, p in zip(some, p_yes, strict=True)
        }
    return asking, reading, found


def _member(storage: Storage, item: dict[str, Any]) -> bytes:
    return storage.read_bytes(item["shard"], item["offset"], item["offset"] + item["nbytes"])


def _annotated(run: Resolved, gpu: bool) -> tuple[float, dict[str, float], dict[str, dict[str, float]]]:
    """Accelerator-seconds that the run held, those of them that went to no sample, and the answers."""
    with ExitStack() as stack:

        @cache
        def cluster() -> Cluster:
            if gpu:
                _with_gpu(run)
                stack.callback(ray.shutdown)
            return stack.enter_context(ray_session(None, worker_env(run.spec.layout.threads), {}))

        done = rejudge(run, cluster)
    assert done.samples == len(read_decisions(run.storage)) and done.failed == 0, str(done)
    (ended,) = (
        row
        for row in Table(run.storage, "runs").read().to_pylist()
        if row["event"] == "ended" and row["run_id"] == done.run_id
    )
    scores = {key: dict(one.scores) for key, one in read_decisions(run.storage).items()}
    return ended["allocated_accelerator_seconds"], json.loads(ended["overhead_json"]), scores


def _with_gpu(run: Resolved) -> None:
    env = worker_env(run.spec.layout.threads)
    ray.init(
        "local", num_cpus=3, num_gpus=1, runtime_env={"env_vars": env}, log_to_driver=False, include_dashboard=False
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--gpu", action="store_true", help="the graph of a machine with a GPU, on this one's CPUs")
    parser.add_argument("--seed", type=int, default=0, help="other scenes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
