"""Put the trained parts together as one WanPipeline checkpoint, in float16: `folder`/shapes/generator.

python -m models.pack.train.assemble
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

FLOW_SHIFT = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/pack"))
    options = parser.parse_args()
    assemble(options.folder, options.folder / "shapes" / "generator")


def assemble(parts: Path, folder: Path) -> None:
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
    pipe.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main()
