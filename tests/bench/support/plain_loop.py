"""The baseline of `overhead`: what somebody writes who has a diffusers pipeline, a multimodal model and an afternoon.

One process, one loop over batches: the pipeline's own call (it encodes, samples and decodes), three questions and two
captions for each clip, an mp4, a tar and a Parquet part for each batch. No stage, no row and no model class of ditmill's.

    python -m tests.bench.support.plain_loop JOB.json    (bench.overhead writes the job)
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

Sample = dict[str, Any]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(job["threads"])
    pipe, processor, judge = load(job)
    loaded = time.time()
    samples = job["samples"]
    out = Path(job["out"])
    out.mkdir(parents=True)
    answers = []
    with torch.inference_mode():
        for start in range(0, len(samples), job["batch_size"]):
            batch = samples[start : start + job["batch_size"]]
            frames = generate(pipe, batch, job)
            shown = frames[:, np.linspace(0, frames.shape[1] - 1, job["num_frames_shown"]).round().astype(int)]
            scores = [ask(processor, judge, shown, batch, question) for question in job["questions"]]
            captions = [caption(processor, judge, shown, text, job["max_new_tokens"]) for text in job["instructions"]]
            rows = [
                {
                    **sample,
                    "p_yes": [float(question[at]) for question in scores],
                    "verdict": "accepted" if all(question[at] >= 0 for question in scores) else "rejected",
                    "captions": [style[at] for style in captions],
                }
                for at, sample in enumerate(batch)
            ]
            write(out / f"{start:08d}", rows, frames, job["fps"])
            answers += rows
    ended = time.time()
    print(json.dumps({"loaded": loaded, "ended": ended, "rows": answers}))


def load(job: dict[str, Any]) -> tuple[Any, Any, Any]:
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    pipe = WanPipeline.from_pretrained(job["generator"], dtype=torch.float32)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    processor = AutoProcessor.from_pretrained(job["judge"])
    processor.tokenizer.padding_side = "left"
    judge = AutoModelForImageTextToText.from_pretrained(job["judge"], dtype=torch.float32).eval()
    return pipe, processor, judge


def generate(pipe: Any, batch: list[Sample], job: dict[str, Any]) -> np.ndarray:
    """Frames uint8 [n, T, H, W, 3], from the noise that each sample names."""
    import torch

    scale = pipe.vae_scale_factor_spatial
    frames = (job["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    shape = (pipe.transformer.config.in_channels, frames, job["height"] // scale, job["width"] // scale)
    noise = [np.random.Generator(np.random.Philox(key=int(sample["noise_key"], 16))) for sample in batch]
    latents = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in noise])
    video = pipe(
        prompt=[sample["prompt"] for sample in batch],
        negative_prompt=[""] * len(batch),
        height=job["height"],
        width=job["width"],
        num_frames=job["num_frames"],
        num_inference_steps=job["num_inference_steps"],
        guidance_scale=job["guidance_scale"],
        max_sequence_length=job["max_sequence_length"],
        latents=torch.from_numpy(latents),
        output_type="np",
    ).frames
    return (np.asarray(video) * 255).round().astype(np.uint8)


def ask(processor: Any, judge: Any, frames: np.ndarray, batch: list[Sample], question: str) -> np.ndarray:
    """P(yes) for each clip."""
    import torch

    inputs = inputs_of(processor, frames, [question.replace("{prompt}", sample["prompt"]) for sample in batch])
    logits = judge.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    ).logits[0]
    words = [[word, f" {word}"] for word in ("Yes", "No")]
    tokens = [[processor.tokenizer.encode(form, add_special_tokens=False)[0] for form in forms] for forms in words]
    answers = torch.stack([torch.logsumexp(logits[:, forms], dim=-1) for forms in tokens], dim=-1)
    return torch.softmax(answers, dim=-1)[:, 0].numpy()


def caption(processor: Any, judge: Any, frames: np.ndarray, instruction: str, max_new_tokens: int) -> list[str]:
    inputs = inputs_of(processor, frames, [instruction] * len(frames))
    tokens = judge.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    said = processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in said]


def inputs_of(processor: Any, frames: np.ndarray, texts: list[str]) -> Any:
    from PIL import Image

    prompts = []
    for text in texts:
        content = [{"type": "image"}] * frames.shape[1] + [{"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    images = [[Image.fromarray(frame) for frame in clip] for clip in frames]
    return processor(text=prompts, images=images, padding=True, return_tensors="pt")


def write(path: Path, rows: list[Sample], frames: np.ndarray, fps: float) -> None:
    """A tar of mp4 and json, and a Parquet part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for row, clip in zip(rows, frames, strict=True):
            video = mp4(clip, fps)
            row["sha256"] = hashlib.sha256(video).hexdigest()
            for suffix, data in (("mp4", video), ("json", json.dumps(row).encode())):
                info = tarfile.TarInfo(f"{row['sample_id']}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"), compression="zstd")


def mp4(clip: np.ndarray, fps: float) -> bytes:
    """H.264 with the settings of infra/media.py, so that the same frames give the same bytes."""
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

    buffer = io.BytesIO()
    reformatter = VideoReformatter()
    options = {"movflags": "+faststart"}
    with av.open(
        buffer, "w", format="mp4", options=options, io_open=lambda *_: io.BytesIO(buffer.getvalue())
    ) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        stream.options = {"crf": "18", "preset": "medium", "x264-params": "cpu-independent=1"}
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        stream.codec_context.color_range = 1
        for at, pixels in enumerate(clip):
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(pixels, format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
                threads=1,
            )
            frame.pts = at
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


if __name__ == "__main__":
    main()
