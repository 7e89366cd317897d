"""Long video from pack://shapes by DualParal: whether it keeps what was asked, has seams, and needs more memory.

    ditmill bench long [--prompts 6] [--frames 1025] [--folder out/pack/shapes] [--sheet long.png]

Prompts are held-out ones of one figure that is still, spins or bounces, which can go on for ever; each is also made as a clip
of 17 frames, from the same seed: the baseline. The oracle reads the video in windows of 17 frames. One process, one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from models.loading import GeneratorRef
from models.pack.grammar import Figure as Shown
from models.pack.grammar import Scene, Shot, complete, is_held_out
from models.pack.oracle import match, read
from models.pack.phrases import describe
from models.pack.train.denoiser import ENDLESS
from models.pack.train.loop import stream
from models.pack.world import NUM_FRAMES
from models.parallel.dualparal import Blocks
from models.plan import SamplerPlan
from models.source import resolve
from pipelines.sections import PACK_GUIDANCE
from tests.bench.support.contact_sheet import contact_sheet
from tests.bench.support.figures import Figure, resampled, share, table
from tests.bench.support.output_file import output_file
from tests.bench.support.pack_parts import Asked, Generated, generate, make

BLOCKS = (2, 1)
"""Latent frames of a block, and of its context."""
SHORTER = 257
"""Frames of the video whose memory is compared."""
LOST, SEAM, MORE = 5.0, 1.2, 1.05
"""Points of accuracy, change at a seam by change elsewhere, peak memory by that of the shorter video: at most."""


def main() -> None:
    import torch

    torch.set_num_threads(1)
    options = _arguments()
    ref = GeneratorRef(resolve(str(options.folder / "generator") if options.folder else "pack://shapes", "generator"))
    plan = SamplerPlan(num_inference_steps=options.steps, guidance_scale=options.guidance)
    blocks = replace(plan, blocks=BLOCKS)
    if options.peak:
        make(ref, blocks, _asked(1, options.seed, options.peak), 1, options.seed, _say)
        # Not getrusage: its maximum is that of the parent too, from before this process was started.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    short = generate(ref, plan, _asked(options.prompts, options.seed, NUM_FRAMES), 16, options.seed, _say)
    long = generate(ref, blocks, _asked(options.prompts, options.seed, options.frames), 1, options.seed, _say)
    if options.sheet:
        ends = [clip[np.linspace(0, len(clip) - 1, NUM_FRAMES).round().astype(int)] for clip in long.clips]
        contact_sheet(np.stack(ends), list(long.asked.prompts)).save(options.sheet, optimize=True)
    print(f"{options.prompts} videos of {options.frames} frames, {options.steps} steps, guidance {options.guidance:g}")
    print(table([*_accuracy(short, long), *_seams(short, long), *_memory(options)]))


def _asked(count: int, seed: int, num_frames: int) -> Asked:
    rng = stream(seed, 6_400_000)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = complete(Scene((Shot((Shown(motion=ENDLESS[len(scenes) % len(ENDLESS)]),)),)), rng)
        if is_held_out(scene):
            scenes.append(scene)
    return Asked(tuple(scenes), tuple(describe(scene, rng) for scene in scenes), num_frames)


def _accuracy(short: Generated, long: Generated) -> Iterator[Figure]:
    starts = range(0, long.asked.num_frames - NUM_FRAMES + 1, NUM_FRAMES - 1)
    right = [
        [match(read(clip[start : start + NUM_FRAMES]), scene) for start in starts]
        for clip, scene in zip(long.clips, long.asked.scenes, strict=True)
    ]
    for name in ("colour", "shape", "motion"):
        before = np.asarray([row[name] for row in short.right], dtype=float)
        after = np.asarray([np.mean([row[name] for row in rows]) for rows in right])
        yield share("17 frames", f"{name} right", int(before.sum()), len(before))
        target = {} if name == "motion" else {"target": LOST, "sense": "at most"}
        yield resampled("long", f"{name} right, by windows", lambda each: 100 * float(each.mean()), after, unit="%")
        yield resampled(
            "long", f"{name}, points lost", lambda b, a: 100 * float((b - a).mean()), before, after, **target
        )


def _seams(short: Generated, long: Generated) -> Iterator[Figure]:
    """Mean change from frame to frame where blocks meet, by that elsewhere; of clips, where latent frames meet."""
    frames, context = BLOCKS
    blocks = Blocks.covering((long.asked.num_frames - 1) // 4 + 1, frames, context)
    latents = range(2, (NUM_FRAMES - 1) // 4 + 1)
    yield _at(short, list(latents), "17 frames", "change where latent frames meet by change elsewhere")
    met = _at(long, [context + frames * block for block in range(1, blocks.count)], "long", "change at seams, the same")
    yield replace(met, target=SEAM, sense="at most")


def _at(made: Generated, latents: list[int], part: str, name: str) -> Figure:
    change = np.stack([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean(axis=(1, 2, 3)) for clip in made.clips])
    here = np.zeros(change.shape[1], dtype=bool)
    here[[4 * latent - 4 for latent in latents]] = True  # from frame 4 k - 4 to the first of latent frame k
    return resampled(part, name, lambda each: float(each[:, here].mean() / each[:, ~here].mean()), change)


def _memory(options: argparse.Namespace) -> Iterator[Figure]:
    """Peak memory of a process that makes one video, in a process of its own for each length.

    What it computes with, not what glibc's heap keeps besides: that is up to three times as much, by chance.
    """
    peaks, env = {}, os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    for num_frames in (SHORTER, options.frames):
        command = [sys.executable, "-m", "tests.bench.long", "--peak", str(num_frames), "--steps", "2"]
        command += ["--folder", str(options.folder)] if options.folder else []
        peaks[num_frames] = (
            int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout) / 1024
        )
        yield Figure("memory", f"peak, {num_frames} frames", peaks[num_frames], unit="MiB")
    ratio = peaks[options.frames] / peaks[SHORTER]
    yield Figure("memory", "ratio", ratio, target=MORE, sense="at most")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="videos")
    parser.add_argument("--frames", type=int, default=1025, help="frames of each; 4 (2 N + 1) - 3 of them for N blocks")
    parser.add_argument("--folder", type=Path, help="a pack that is not committed: a folder with generator")
    parser.add_argument("--sheet", type=output_file, help="write frames of each video to this PNG")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=PACK_GUIDANCE, help="guidance_scale")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other prompts and noise")
    parser.add_argument(
        "--peak", type=int, default=0, help="make one video of so many frames, print peak memory in KiB"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
