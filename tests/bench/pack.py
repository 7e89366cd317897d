"""What pack://shapes reaches: generated, judged, captioned and expanded from held-out prompts, read by the oracle.

    ditmill bench pack [--samples 1000] [--folder out/pack/shapes] [--sheet sheet.png] [--json]

Models are loaded and run by the code of a run, without Ray, on one thread. Every figure stands beside its 95% interval
(Wilson for shares, bootstrap for the rest) and its target; a part that is not there says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from infra.errors import UserError
from models.loading import GeneratorRef
from models.pack import PARTS
from models.pack.grammar import KINDS
from models.pack.phrases import describe
from models.pack.train.judge_exam import auroc, ece
from models.pack.train.loop import stream
from models.plan import SamplerPlan
from models.source import resolve
from pipelines.sections import PACK_GUIDANCE
from tests.bench.support.contact_sheet import contact_sheet
from tests.bench.support.figures import Figure, resampled, share, table
from tests.bench.support.output_file import output_file
from tests.bench.support.pack_parts import (
    Generated,
    altered,
    captioned,
    generate,
    held_out,
    judged,
    load_seconds,
    reconstruct,
)

SINGLE, EACH, DOUBLE = 0.90, 0.95, 0.70
SHEET = 64
TITLES = {"one": "one figure", "two": "two figures", "cut": "two shots"}
TRAINED_PARTS = {"generator": ("VAE", "generator", "images"), "judge": ("judge",), "expander": ("expander",)}


def main() -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    options = _arguments()
    figures: list[Figure] = []
    try:
        figures.extend(measure(parts(options.folder), options))
    finally:  # what was measured in a quarter of an hour is shown, whatever stopped it
        report(figures, options)


def report(figures: list[Figure], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([figure.as_dict() for figure in figures]))
        return
    name = options.folder or "pack://shapes"
    settings = f"{options.steps} steps, guidance {options.guidance:g}, seed {options.seed}, one thread"
    print(f"{name}: {options.samples} held-out prompts, {settings}")
    print(table(figures))


def parts(folder: Path | None) -> dict[str, str]:
    """Checkpoint folders of the parts that are there."""
    found = {}
    for part in PARTS:
        if folder is None:
            try:
                found[part] = resolve("pack://shapes", part)
            except UserError as error:
                say(str(error), always=True)
        elif (folder / part).is_dir():
            found[part] = resolve(str(folder / part), part)
    return found


def measure(paths: dict[str, str], options: argparse.Namespace) -> Iterator[Figure]:
    """All figures, part by part."""
    for part in PARTS:
        if part not in paths:
            yield from (Figure(name, "", None, note="not there") for name in TRAINED_PARTS[part])
    yield from sizes(paths)
    made = None
    if "generator" in paths:
        loaded = load_seconds(paths)
        yield Figure("pack", "loading it whole", loaded["wall"], unit="s", target=5.0, sense="at most")
        yield Figure("pack", "loading it whole, CPU-seconds", loaded["cpu"], unit="s")
        yield from vae(paths["generator"], options)
        ref = GeneratorRef(paths["generator"])
        made = generate(
            ref, plan(options), held_out(options.samples, options.seed), options.batch_size, options.seed, say
        )
        if options.sheet:
            save_sheet(made, options.sheet)
        yield from generator(made)
        asked = held_out(max(1, options.samples // 4), options.seed, kinds=("one", "two"), image=True)
        images = generate(ref, plan(options), asked, options.batch_size, options.seed, say)
        yield from attributes("images", "", images, range(len(images.clips)), {})
    if "judge" in paths and made is not None:
        yield from judge(paths["judge"], made, options)
    if "expander" in paths:
        yield from expander(paths["expander"], options)


def plan(options: argparse.Namespace) -> SamplerPlan:
    return SamplerPlan(num_inference_steps=options.steps, guidance_scale=options.guidance)


def sizes(paths: dict[str, str]) -> Iterator[Figure]:
    """What the pack weighs."""
    files = [file for path in paths.values() for file in Path(path).rglob("*") if file.is_file()]
    weights = [file.stat().st_size for file in files]
    if weights:
        yield Figure("pack", "all files", sum(weights) / 1e6, unit="MB", target=48.0, sense="at most")
        yield Figure("pack", "largest file", max(weights) / 2**20, unit="MiB", target=15.0, sense="at most")


def vae(folder: str, options: argparse.Namespace) -> Iterator[Figure]:
    psnr, same = reconstruct(Path(folder), min(options.samples, 500), options.seed, say)
    yield resampled("VAE", "PSNR of reconstructions", lambda each: float(each.mean()), psnr, unit="dB", target=30.0)
    right = [good for row in same for name, good in row.items() if name != "count"]
    yield share("VAE", "attributes that read as on the original", sum(right), len(right), 0.99)
    yield share("VAE", "clips that read as the original", sum(all(row.values()) for row in same), len(same))


def generator(made: Generated) -> Iterator[Figure]:
    decode = made.seconds["decode"]
    yield Figure("VAE", "decoding a clip, CPU-seconds", decode, unit="s", target=0.15, sense="at most")
    yield Figure("generator", "a clip, CPU-seconds", sum(made.seconds.values()), unit="s", target=1.0, sense="at most")
    targets = {"one": {"all": SINGLE} | dict.fromkeys(("shape", "colour", "size", "motion", "background"), EACH)}
    targets["two"] = {"all": DOUBLE}
    for kind in KINDS:
        rows = [at for at, scene in enumerate(made.asked.scenes) if scene.kind == kind]
        yield from attributes("generator", f"{TITLES[kind]}, ", made, rows, targets.get(kind, {}))


def attributes(
    part: str, title: str, made: Generated, rows: Sequence[int], targets: dict[str, float]
) -> Iterator[Figure]:
    """The share of clips that show every attribute asked for, and of each attribute."""
    right = [made.right[at] for at in rows]
    yield share(part, f"{title}all right", sum(all(row.values()) for row in right), len(right), targets.get("all"))
    for name in ("count", "shape", "colour", "size", "motion", "background"):
        asked = [row[name] for row in right if name in row]
        if asked:
            yield share(part, f"{title}{name}", sum(asked), len(asked), targets.get(name))


def judge(path: str, made: Generated, options: argparse.Namespace) -> Iterator[Figure]:
    """prompt_match on the generated clips, asked with their own prompt and with one that is wrong in one attribute."""
    from models.pack.oracle import match

    rng = stream(options.seed, 6_200_000)
    others = [altered(scene, rng) for scene in made.asked.scenes]
    truth = np.asarray([all(row.values()) for row in made.right])
    wrong = [all(match(seen, scene).values()) for seen, scene in zip(made.readings, others, strict=True)]
    own, seconds = judged(path, made, made.asked.prompts, options.batch_size, say)
    other, _ = judged(path, made, [describe(scene, rng) for scene in others], options.batch_size, say)
    both, all_truth = np.concatenate([own, other]), np.concatenate([truth, np.asarray(wrong)])
    for title, scores, labels in (("own prompts", own, truth), ("own and altered prompts", both, all_truth)):
        yield resampled("judge", f"AUROC of prompt_match, {title}", auroc, scores, labels, target=0.97)
        yield resampled("judge", f"calibration error, {title}", ece, scores, labels, target=0.05, sense="at most")
    yield Figure("judge", "a question on a clip, CPU-seconds", seconds, unit="s")
    for style, target in (("short", 0.90), ("dense", None)):
        right, asked = captioned(path, made, style, options.batch_size, say)
        yield share("judge", f"{style} captions, every attribute right", right, asked, target)


def expander(path: str, options: argparse.Namespace) -> Iterator[Figure]:
    from models.pack.train.expander import BARE_VARIANTS
    from models.pack.train.expander import measure as measure_expander

    say(f"expanding {options.samples} prompts")
    found = measure_expander(path, options.seed, options.samples)
    for name, title in (("in the grammar", "in the grammar"), ("keeps", "and keeps what was said")):
        yield share("expander", title, *found["shares"][name], 0.98)
    yield share("expander", "and leaves nothing unsaid", *found["shares"]["complete"])
    name = f'different ones of "a circle", of {BARE_VARIANTS}'
    yield Figure("expander", name, found["distinct"], n=BARE_VARIANTS, target=20)


def save_sheet(made: Generated, path: Path) -> None:
    """64 clips with their prompts, and what the oracle finds wrong."""
    texts = []
    for prompt, right in list(zip(made.asked.prompts, made.right, strict=True))[:SHEET]:
        wrong = ", ".join(name for name, good in right.items() if not good)
        texts.append(f"{prompt} [WRONG: {wrong}]" if wrong else prompt)
    contact_sheet(made.clips[:SHEET], texts).save(path, optimize=True)
    say(f"wrote {path}", always=True)


_started = time.monotonic()
_said = 0.0


def say(text: str, always: bool = False) -> None:
    """A line of progress on stderr, every few seconds at most."""
    global _said
    now = time.monotonic()
    if always or now - _said > 5:
        _said = now
        print(f"{now - _started:6.0f} s  {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samples", type=int, default=1000, help="held-out prompts of videos; a fourth as many of images"
    )
    parser.add_argument(
        "--folder", type=Path, help="a pack that is not committed: a folder with generator, judge, expander"
    )
    parser.add_argument("--sheet", type=output_file, help="write a contact sheet of 64 samples to this PNG")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=PACK_GUIDANCE, help="guidance_scale")
    parser.add_argument("--batch-size", type=int, default=16, help="samples denoised together")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other prompts and noise")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
