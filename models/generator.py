"""Generators: a diffusers checkpoint as three functions of arrays, encode, sample and decode.

Each loads only what it computes with, so that encoding, sampling and decoding can live on different machines.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.errors import UserError
from models.accelerate.applied import accelerated
from models.accelerate.course import Savings
from models.accelerate.registry import check as check_techniques
from models.arguments import argument_of, step_noise
from models.conditions import encode_texts, text_length
from models.decoding import SCALING, decode, scaling_of
from models.early import Early, check_early, check_look, looking
from models.evaluations import Evaluations
from models.families import DENOISERS, GUIDANCE, Family, family_of
from models.hand_off import handing_off, load_teacher
from models.loading import GeneratorRef, Part, denoiser_of, load_pipeline, loaded_by_ranks, read_index
from models.parallel.schedule import block_error
from models.path import Path, check_scheduler
from models.placement import device_of, dtype_of
from models.plan import SamplerPlan
from models.scenes import encode_scenes, texts_of
from models.schedulers import build_scheduler, is_flow

if TYPE_CHECKING:
    from models.parallel.dualparal import Blocks

__all__ = ["Generator", "GeneratorRef", "load_generator"]

Shape = tuple[int, int, int]
"""Height, width and number of frames."""


@cache
def load_generator(ref: GeneratorRef) -> Generator:
    """The generator of `ref`, one a process. A checkpoint that cannot be read is a UserError."""
    return Generator(ref)


class Generator:
    """One checkpoint. `family` is None where its pipeline runs whole: then only `run_whole` and `describe` apply."""

    def __init__(self, ref: GeneratorRef) -> None:
        self.ref = ref
        self.pipeline = str(read_index(ref.path)["_class_name"])
        self.family: Family | None = None if ref.remote_code else family_of(self.pipeline)
        self._pipes: dict[str, Any] = {}
        self._schedulers: dict[str, Any] = {}
        self._schedules: dict[tuple[str, Shape], dict[str, Any]] = {}
        self._whole_shapes: dict[Shape, tuple[int, ...] | None] = {}
        self._layout: Any = None
        self._teacher: Any = None

    @property
    def batches(self) -> bool:
        """Are samples denoised together? If not, padding a batch would only cost time."""
        return self.family is not None and self.family.batches

    @property
    def denoisers(self) -> list[Any]:
        """The network that is evaluated at each step, or the two experts of a family that has two."""
        return [found for name in DENOISERS if (found := getattr(self._pipe("sample"), name, None)) is not None]

    def load(self, part: Part) -> None:
        """Load what `part` computes with; calling it again costs nothing."""
        self._pipe(part)

    def check_plan(self, plan: SamplerPlan, with_path: bool = False, early_at: float | None = None) -> None:
        """Raise a UserError that names the key where this checkpoint cannot follow the plan in that way."""
        check_techniques(
            plan,
            self.family,
            self.ref.parallel,
            teacher=self.ref.teacher is not None,
            compiled=self.ref.compile,
            offloaded=self.ref.offload != "none",
        )
        scheduler = self._scheduler(plan)
        if with_path:
            check_scheduler(scheduler)
        if early_at is not None:
            check_early(self.family, self.ref, plan)
            check_look(scheduler, plan, early_at, self._known.sets_sigmas)

    def check(self, plan: SamplerPlan, height: int, width: int, num_frames: int) -> None:
        """`check_plan`, and the same for a media shape."""
        self.check_plan(plan)
        pipe = self._pipe("sample")
        wrong = self.family.shape_error(pipe, height, width, num_frames) if self.family else None
        if self.family and plan.blocks is not None and not wrong:
            wrong = block_error(self.family.temporal_factor(pipe), num_frames, *plan.blocks)
        if wrong:
            raise UserError(f"buckets: {wrong}")

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Shape of one sample's latents and noise: (channels, frames, height, width), images without frames."""
        return self._known.latent_shape(self._pipe("sample"), height, width, num_frames)

    def blocks(self, plan: SamplerPlan, num_frames: int) -> Blocks:
        """The blocks that DualParal cuts a video of so many frames into, where `plan` has any."""
        from models.parallel.dualparal import Blocks

        assert plan.blocks is not None
        return Blocks.covering((num_frames - 1) // self._known.temporal_factor(self._pipe("encode")) + 1, *plan.blocks)

    def text_length(self, plan: SamplerPlan) -> int | None:
        """Tokens that `encode` pads or cuts every text to; None where the encoder has one fixed length."""
        return text_length(self._known, self._pipe("encode"), plan)

    def encode(
        self, prompts: list[str], negative_prompts: list[str], images: list[np.ndarray], plan: SamplerPlan
    ) -> dict[str, np.ndarray]:
        """Conditions by the name of the pipeline's argument, each [n, ...]: float32 embeddings, integer masks. Of a plan
        with scenes, `encode_scenes`'.

        `images` are first frames, uint8 [height, width, 3], where the family wants them; empty elsewhere.
        """
        if self.ref.teacher is not None:  # it alone is guided
            plan = replace(plan, guidance_scale=self.ref.teacher.guidance_scale)
        encode = partial(encode_texts, self._known, self._pipe("encode"), plan=plan)
        if plan.scenes is None:
            conditions = encode(prompts, negative_prompts)
        else:
            conditions = encode_scenes(encode, prompts, negative_prompts, plan.scenes[0])
        return conditions | ({"image": np.stack(images)} if self._known.inputs else {})

    def sample(
        self,
        conditions: dict[str, np.ndarray],
        noise: np.ndarray,
        plan: SamplerPlan,
        height: int,
        width: int,
        num_frames: int,
        fps: float,
        path: Path | None = None,
        savings: Savings | None = None,
        early: Early | None = None,
    ) -> tuple[np.ndarray, int]:
        """Latents [n, *latent_shape] float32 from noise of that shape, and denoiser evaluations for each sample.

        Latents are the denoiser's own, scaled as `describe` says. `path` collects states on the way, and changes no bit;
        `savings` what techniques of the plan saved, where it has any. Samples that `early` stops have latents of no meaning.
        """
        shape = (height, width, num_frames)
        self.check(plan, *shape)
        step = len(noise) if self._known.batches else 1
        rest = (plan, shape, fps, path, savings, early)
        parts = [slice(start, start + step) for start in range(0, len(noise), step)]
        results = [
            self._sample({name: value[part] for name, value in conditions.items()}, noise[part], *rest)
            for part in parts
        ]
        return np.concatenate([latents for latents, _ in results]), results[0][1]

    def decode(self, latents: np.ndarray, height: int, width: int, num_frames: int) -> np.ndarray:
        """Pixels [n, num_frames, height, width, 3] uint8 RGB of latents [n, *latent_shape]."""
        pipe = self._pipe("decode")
        if self.ref.parallel.vae > 1:
            from models.parallel.tiles import split_tiles

            split_tiles(pipe.vae)
        return decode(self._known, pipe, latents, height, width, num_frames)

    def run_whole(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        noise_keys: list[str],
        plan: SamplerPlan,
        height: int,
        width: int,
        num_frames: int,
        fps: float,
    ) -> tuple[np.ndarray, int]:
        """Frames [n, num_frames, height, width, 3] uint8, and evaluations for each sample, by a pipeline of no family."""
        from models.whole import run_whole

        pipe = self._pipe("sample")
        frames = []
        with Evaluations(pipe) as evaluations:
            for sample in zip(prompts, negative_prompts, noise_keys, strict=True):
                pipe.scheduler = self._scheduler(plan)
                frames.append(run_whole(pipe, *sample, plan, height, width, num_frames, fps, self._whole_shapes))
        self._remember(plan, (height, width, num_frames))
        return np.stack(frames), evaluations.rows // len(frames)

    def describe(self, plan: SamplerPlan, height: int, width: int, num_frames: int) -> dict[str, Any]:
        """What `plan` means here, for `plan_json`: scheduler, guidance, text length, latent layout and scaling.

        `sigmas` and `timesteps` are those that the pipeline used; they are there once a sample of this shape was made.
        """
        import diffusers

        pipe = self._pipe("sample")
        scheduler = self._scheduler(plan)
        config = {name: _plain(value) for name, value in scheduler.config.items() if not name.startswith("_")}
        facts: dict[str, Any] = {
            "plan": json.loads(plan.to_json()),
            "pipeline": self.pipeline,
            "diffusers": diffusers.__version__,
            "dtype": str(denoiser_of(pipe).dtype).removeprefix("torch."),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": config,
            "shift": None if plan.sigmas else config.get("flow_shift", config.get("shift")),
            "flow": is_flow(scheduler),
            "guidance_scale": plan.guidance_scale,
            **({} if self.ref.teacher is None else {"teacher": self.ref.teacher.facts()}),
            **self._schedules.get((plan.plan_id, (height, width, num_frames)), {}),
        }
        if self.family is None:
            return facts
        latents = {
            "shape": list(self.latent_shape(height, width, num_frames)),
            "scaling": SCALING,
            **scaling_of(pipe.vae),
        }
        return facts | {
            "family": self.family.name,
            "guidance": GUIDANCE[self.family.guidance],
            "max_sequence_length": text_length(self.family, pipe, plan),
            "latent_layout": self.family.layout,
            "latents": latents,
        }

    @property
    def _known(self) -> Family:
        if self.family is None:
            raise UserError(f"generators.model: {self.pipeline} runs whole; it cannot encode, sample and decode apart")
        return self.family

    def _pipe(self, part: Part) -> Any:
        """The pipeline for a part; one that is loaded already and holds what the part needs serves it too."""
        if self.family is None or self.ref.adapters or (part == "decode" and "sample" in self._pipes):
            part = "sample"
        if part not in self._pipes:
            self._pipes[part] = pipe = load_pipeline(self.ref, self.family, part)
            if part == "sample" and (folders := loaded_by_ranks(self.ref)):
                from models.parallel.layout import load_parts

                device = device_of(self.ref.device)
                load_parts(pipe, folders, self.ref.parallel, device, dtype_of(self.ref.dtype, device))
            if part == "sample" and self.ref.teacher is not None:
                self._teacher = load_teacher(self.ref)
            self._schedulers[part] = getattr(self._pipes[part], "scheduler", None)
        return self._pipes[part]

    def lay_out(self, plan: SamplerPlan) -> None:
        """Cut the denoiser for this rank, once its process group is there, and give it its attention kernel."""
        if self._layout is not None or (self.ref.parallel.size == 1 and self.ref.attention == "native"):
            return
        from models.parallel.layout import lay_out

        pipe = self._pipe("sample")
        self._layout = lay_out(
            pipe,
            self.ref.parallel,
            in_blocks=plan.blocks is not None,
            device=pipe._execution_device.type,
            attention=self.ref.attention,
        )

    def _scheduler(self, plan: SamplerPlan) -> Any:
        """A fresh one each time: schedulers remember the last samples they saw."""
        self._pipe("sample")
        base = self._schedulers["sample"]
        if base is None:
            raise UserError(f"generators.model: {self.pipeline} has no scheduler; such pipelines cannot be run")
        return build_scheduler(base, plan, sets_sigmas=self.family is not None and self.family.sets_sigmas)

    def _sample(
        self,
        conditions: dict[str, np.ndarray],
        noise: np.ndarray,
        plan: SamplerPlan,
        shape: Shape,
        fps: float,
        path: Path | None,
        savings: Savings | None,
        early: Early | None,
    ) -> tuple[np.ndarray, int]:
        import torch

        family, pipe = self._known, self._pipe("sample")
        self.lay_out(plan)
        if plan.blocks is not None:
            return self._sample_blocks(conditions, noise, plan, shape)
        dtype, device = denoiser_of(pipe).dtype, pipe._execution_device
        arguments: dict[str, Any] = {
            "num_inference_steps": plan.num_inference_steps,
            "height": shape[0],
            "width": shape[1],
            "output_type": "latent",
            "generator": [step_noise(row) for row in noise],
            **family.guidance_arguments(plan.guidance_scale),
            **dict(family.call),
        }
        if family.media == "video":
            arguments["num_frames"] = shape[2]
        if family.packing == "video_tokens":
            arguments["frame_rate"] = fps
        arguments |= {name: argument_of(value, dtype, device) for name, value in conditions.items()}
        pipe.scheduler = self._scheduler(plan)
        latents = torch.from_numpy(np.ascontiguousarray(noise)).to(device, family.noise_dtype(dtype))
        latents = family.pack(pipe, latents)
        if path is not None:
            unpack = partial(family.unpack, pipe, shape=noise.shape[1:])
            arguments["callback_on_step_end"] = path.callback(latents, unpack)
        sampling = nullcontext() if self._layout is None else self._layout.sampling(pipe, arguments)
        handing = handing_off(pipe, self._teacher, self.ref.teacher, arguments)
        techniques = accelerated(
            pipe,
            plan,
            arguments,
            len(noise),
            layout=self._layout,
            limit=self.ref.max_cache_bytes,
            savings=savings,
            has_teacher=self.ref.teacher is not None,
            followers=None if early is None else early.followers,
        )
        counting = Evaluations(pipe, self._teacher)
        watching = looking(early, family, pipe, noise.shape, shape, counting)
        with torch.inference_mode(), watching, counting as evaluations, sampling, techniques as changed, handing:
            output = pipe(latents=latents, **arguments | changed)
            latents = family.unpack(pipe, output[0], noise.shape[1:])
        self._remember(plan, shape)
        return latents.float().cpu().numpy(), evaluations.rows // len(noise)

    def _sample_blocks(
        self, conditions: dict[str, np.ndarray], noise: np.ndarray, plan: SamplerPlan, shape: Shape
    ) -> tuple[np.ndarray, int]:
        """The same by DualParal. Of several stages only the first has latents; the others return zeros."""
        import torch

        from models.parallel.dualparal import Blocks, DualParal, Video
        from models.parallel.layout import Layout, denoisers_of

        assert plan.blocks is not None
        pipe, layout = self._pipe("sample"), self._layout or Layout()
        device, steps = pipe._execution_device, plan.num_inference_steps
        blocks = Blocks.covering(noise.shape[2], *plan.blocks)
        first = torch.from_numpy(np.ascontiguousarray(noise[:, :, : blocks.size(0)])).to(device)
        embeds = {name: argument_of(value, pipe.transformer.dtype, device) for name, value in conditions.items()}
        # One after the other through the queue, not beside each other: it fills and drains once for all of them.
        videos = [
            Video(first[at : at + 1], partial(texts_of, embeds, plan, blocks.count, at), [step_noise(row)])
            for at, row in enumerate(noise)
        ]

        def scheduler() -> Any:
            pipe.scheduler = self._scheduler(plan)
            pipe.scheduler.set_timesteps(steps, device=device)
            return pipe.scheduler

        experts = denoisers_of(pipe)
        trained = scheduler().config.num_train_timesteps
        sampler = DualParal(
            experts,
            scheduler,
            boundary=pipe.config.boundary_ratio * trained if len(experts) > 1 else None,
            steps=steps,
            guidance_scale=plan.guidance_scale,
            stages=layout.stages,
            branches=layout.branches,
            split=layout.split,
        )
        latents = np.zeros(noise.shape, dtype=np.float32)
        try:
            for at, block, made in sampler.sample(videos, blocks):
                start = block * blocks.frames + (blocks.context if block else 0)
                latents[at, :, start : start + made.shape[2]] = made[0].float().cpu().numpy()
        finally:
            sampler.close()
        self._remember(plan, shape)
        return latents, steps * (2 if plan.guidance_scale > 1 else 1)

    def _remember(self, plan: SamplerPlan, shape: Shape) -> None:
        scheduler = self._pipe("sample").scheduler
        self._schedules[plan.plan_id, shape] = {
            name: np.asarray(getattr(scheduler, name).cpu(), dtype=np.float64).tolist()
            for name in ("sigmas", "timesteps")
            if getattr(scheduler, name, None) is not None
        }


def _plain(value: Any) -> Any:
    """A configuration's value as JSON has it: infinities become text."""
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
