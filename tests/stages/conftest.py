"""Batches as the planner makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROMPTS = (
    "a red circle bouncing",
    "a blue square",
    "the sea at night, seen from a hill above a small town with a harbour and many lights",
    "fire",
    "snow on a mountain",
    "a green star",
    "a dog running",
    "two birds",
)


@pytest.fixture
def planned() -> Callable[..., dict[str, np.ndarray]]:
    """A planned batch of 64x64x17 videos: `planned(3)`, or with columns of one's own: `planned(3, prompt=[...])`."""
    from models.noise import noise_key
    from stages.batch import texts

    def make(count: int, **columns: Any) -> dict[str, np.ndarray]:
        prompts = list(columns.pop("prompt", PROMPTS[:count]))
        batch = {
            "sample_id": texts([f"sample{at}" for at in range(count)]),
            "prompt": texts(prompts),
            "negative_prompt": texts([""] * count),
            "noise_key": texts([noise_key(0, prompt, 0) for prompt in PROMPTS[:count]]),
            "inputs": texts(["[]"] * count),
            "extra": texts([""] * count),
            "error_type": texts([""] * count),
            "error": texts([""] * count),
            "error_stage": texts([""] * count),
            "fps": np.full(count, 8.0),
        }
        shape = {"generator": 0, "height": 64, "width": 64, "num_frames": 17}
        batch |= {name: np.full(count, value, dtype=np.int64) for name, value in shape.items()}
        for name, value in columns.items():
            batch[name] = texts(value) if isinstance(value[0], str) else np.asarray(value)
        return batch

    return make


@pytest.fixture(scope="session")
def tiny_whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline of no family (Stable Diffusion 1)."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from models.pack.tiny import fill_weights
    from models.pack.tiny_language import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.padding_side, tokenizer.model_max_length = "right", 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=4,
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=2,
    )
    for name, model in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        fill_weights(model, name)
    folder = tmp_path_factory.mktemp("whole")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def moving_texture(count: int, height: int = 64, width: int = 96, seed: int = 0, step: int = 2) -> np.ndarray:
    """Frames uint8 [count, height, width, 3] of a view that moves over coloured noise by `step` pixels a frame."""
    import cv2

    noise = np.random.default_rng(seed).standard_normal((height, width + step * count, 3))
    plane = cv2.GaussianBlur(noise, (0, 0), 3)
    plane = ((plane - plane.min()) / np.ptp(plane) * 255).astype(np.uint8)
    return np.stack([plane[:, step * at : step * at + width] for at in range(count)])


class Footage:
    """Writes media files into a folder with PyAV; each method returns the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    frames = staticmethod(moving_texture)

    def video(
        self,
        name: str,
        frames: np.ndarray,
        rate: float = 24,
        codec: str = "libx264",
        pixel_format: str = "yuv420p",
        pts: Sequence[int] | None = None,
        rotate: int = 0,
        hflip: bool = False,
        gop: int = 12,
        options: dict[str, str] | None = None,
        container: dict[str, str] | None = None,
        sound: bool = False,
    ) -> Path:
        """`frames` [T, H, W, 3 or 4] uint8, or planes of `pixel_format` [T, 3 H / 2, W]; `pts` are milliseconds where the
        rate is to vary."""
        import av

        path = self.folder / name
        with av.open(str(path), "w", options=container or {}) as made:
            stream = made.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options or {})
            planes = frames.ndim == 3
            height = frames.shape[1] * 2 // 3 if planes else frames.shape[1]
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], height, pixel_format
            stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
            if rotate or hflip:
                stream.set_display_rotation(rotate, hflip=hflip)
            if pts is not None:
                stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
            voice = made.add_stream("aac", rate=48000, layout="mono") if sound else None
            for at, pixels in enumerate(frames):
                layout = pixel_format if planes else {3: "rgb24", 4: "rgba"}[pixels.shape[-1]]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=layout)
                frame.pts = at if pts is None else pts[at]
                if pts is not None:
                    frame.time_base = Fraction(1, 1000)
                made.mux(stream.encode(frame))
            made.mux(stream.encode())
            if voice is not None:
                self._speak(made, voice, len(frames) / rate)
        return path

    def sound(self, name: str, seconds: float = 1.0, codec: str = "aac") -> Path:
        import av

        path = self.folder / name
        with av.open(str(path), "w") as made:
            self._speak(made, made.add_stream(codec, rate=48000, layout="mono"), seconds)
        return path

    def image(self, name: str, pixels: np.ndarray, **settings: Any) -> Path:
        from PIL import Image

        path = self.folder / name
        Image.fromarray(pixels).save(path, **settings)
        return path

    @staticmethod
    def _speak(made: Any, stream: Any, seconds: float) -> None:
        import av

        tone = np.sin(np.arange(int(48000 * seconds)) * 2 * np.pi * 440 / 48000).astype(np.float32) / 4
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
            made.mux(stream.encode(frame))
        made.mux(stream.encode())


@pytest.fixture
def footage(tmp_path: Path) -> Footage:
    return Footage(tmp_path)
