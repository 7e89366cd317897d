"""Put the trained parts together, in float16: `folder`/shapes/{generator,judge,expander}, as far as they are there.

    python -m models.pack.train.assemble [--into models/pack/shapes] [--judge FOLDER] [--expander FOLDER]
    python -m models.pack.train.assemble --student runs/student --into models/pack/shapes-4step

A part that is not there leaves what was assembled before as it is. Of a student only what differs from pack://shapes is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infra.errors import UserError
from models.source import content_sha256, resolve

FLOW_SHIFT = 3.0

SHIPPED_BESIDE = ("model_index.json", "README.md", "ditmill.json")
"""Of a student, beside its components."""

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# ditmill shapes: generator

A WanPipeline for clips of ditmill's small world, 64x64 pixels and 17 frames. Made by models/pack/train, trained on rendered
clips and nothing else.

Call it with `height=64, width=64, num_frames=17, guidance_scale=1.75, max_sequence_length=48`: it has seen no others.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/pack"), help="what the training scripts wrote")
    parser.add_argument("--into", type=Path, help="the pack's folder; left out, `folder`/shapes")
    parser.add_argument("--judge", type=Path, help="the judge's checkpoint; left out, `folder`/judge")
    parser.add_argument("--expander", type=Path, help="the expander's checkpoint; left out, `folder`/expander")
    parser.add_argument("--student", type=Path, help="a student of pack://shapes, put into the folder --into")
    options = parser.parse_args()
    if options.student:
        into = options.into or options.folder / "shapes-4step"
        _replace(into / "generator", lambda folder: differing(options.student, folder))
        return
    assemble(
        options.folder,
        options.into or options.folder / "shapes",
        judge=options.judge or options.folder / "judge",
        expander=options.expander or options.folder / "expander",
    )


def assemble(parts: Path, pack: Path, *, judge: Path, expander: Path) -> None:
    """Write each part that is there into `pack`, whole or not at all, and say what became of it."""
    if (parts / "denoiser" / "transformer").is_dir() and (parts / "vae").is_dir():
        _replace(pack / "generator", lambda folder: build_generator(parts, folder))
    else:
        print(f"generator: not there; it takes {parts}/vae and {parts}/denoiser", flush=True)
    for name, made in (("judge", judge), ("expander", expander)):
        if (made / "config.json").exists():
            _replace(pack / name, lambda folder, made=made: shutil.copytree(made, folder))  # type: ignore[misc]
        else:
            print(f"{name}: not there; it is looked for in {made}", flush=True)


def build_generator(parts: Path, folder: Path) -> None:
    """Read what the training scripts wrote under `parts`, write a checkpoint that plain diffusers loads."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    half = torch.float16
    pipe = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(parts / "denoiser" / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(parts / "denoiser" / "text_encoder", dtype=half),
        vae=AutoencoderKLWan.from_pretrained(parts / "vae", torch_dtype=half),
        transformer=WanTransformer3DModel.from_pretrained(parts / "denoiser" / "transformer", torch_dtype=half),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
    )
    for part in (pipe.vae, pipe.transformer):
        part.register_to_config(_name_or_path="")  # a folder of this machine
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(CARD)


def differing(student: Path, folder: Path) -> None:
    """Write a student's checkpoint without the components that pack://shapes has too. UserError where it is no student of it:
    the two denoisers have one configuration, and all but the denoiser and the scheduler is the same."""
    teacher = Path(resolve("pack://shapes", "generator"))
    names = sorted(path.parent.name for path in teacher.glob("*/*.json"))
    same = {name for name in names if content_sha256(str(student / name)) == content_sha256(str(teacher / name))}
    others = set(names) - same - {"transformer", "scheduler"}
    if others or _denoiser_config(student) != _denoiser_config(teacher):
        what = ", ".join(sorted(others)) or "its transformer's configuration"
        raise UserError(f"{student}: {what} is not that of pack://shapes; give a student of it")
    for name in sorted(set(names) - same):
        shutil.copytree(student / name, folder / name)
    for name in SHIPPED_BESIDE:  # and not the states of its training
        shutil.copy(student / name, folder / name)


def _denoiser_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Write beside it first: a reader finds the old part or the new one."""
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    print(f"{folder}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB in {len(files)} files", flush=True)


if __name__ == "__main__":
    main()
