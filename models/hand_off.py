"""Diversity distillation: the base model takes the first steps of a sample, its student the rest.

"Distilling Diversity and Control in Diffusion Models" (arXiv 2503.10637). What samples of one prompt have of their own is
settled in the first steps, where a few-step student collapses; from there on it does as well as its teacher. In the
scheduler's first `steps` timesteps the prediction is

    u + w (c - u)       of the teacher's predictions with the prompt, c, and with the negative prompt, u; w <= 1: c alone

and in the others the student's with the prompt, without guidance. The pipeline itself runs with guidance_scale 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from models.families import family_of
from models.loading import GeneratorRef, TeacherRef, load_pipeline, read_index
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan
from models.source import content_sha256

if TYPE_CHECKING:
    from torch import Tensor

_PIPELINE = "WanPipeline"
_SAME_TEXTS = ("text_encoder", "tokenizer")
"""Components whose content must be the same."""
_SAME_CONFIG = {
    "transformer": ("in_channels", "out_channels", "patch_size", "text_dim"),
    "vae": ("z_dim", "latents_mean", "latents_std", "scale_factor_spatial", "scale_factor_temporal"),
}
"""Keys of a component's configuration that say what latents are."""


def check_hand_off(student: str, teacher: TeacherRef) -> None:
    """Raise a UserError, of what key the caller says, where the teacher cannot begin what the student ends.

    `student` is its folder. Only configurations, and the text encoder's content, are read.
    """
    for folder in (student, teacher.path):
        index = read_index(folder)
        if index["_class_name"] != _PIPELINE:
            raise UserError(
                f"{folder} is a {index['_class_name']}, and only a {_PIPELINE} is known to take a step of another model: "
                "set teacher_steps: 0"
            )
        if index.get("boundary_ratio") is not None:
            raise UserError(f"{folder} has two experts, which hand over by themselves: set teacher_steps: 0")
    per_token = [bool(read_index(folder).get("expand_timesteps")) for folder in (student, teacher.path)]
    if per_token[0] != per_token[1]:
        raise UserError(f"{teacher.model} and its student differ in expand_timesteps; name the model it was made from")
    for component, keys in _SAME_CONFIG.items():
        ours, theirs = (_config(folder, component) for folder in (student, teacher.path))
        shared = [key for key in keys if key in ours and key in theirs]  # older checkpoints leave defaults out
        if differing := [key for key in shared if ours[key] != theirs[key]]:
            raise UserError(
                f"{teacher.model} and its student differ in {', '.join(differing)} of the {component}, so their latents "
                "are not the same; name the model it was made from"
            )
    for component in _SAME_TEXTS:
        own, other = (content_sha256(str(Path(folder, component))) for folder in (student, teacher.path))
        if own != other:
            raise UserError(
                f"{teacher.model} has another {component} than its student ({other[:12]} and {own[:12]}), and a sample "
                "is encoded once; name the model it was made from, or copy its folder to the student"
            )


def check_plan(plan: SamplerPlan, teacher: TeacherRef) -> None:
    """Raise a UserError that names the key where a plan cannot be shared with a teacher."""
    if plan.blocks is not None:
        raise UserError(
            "sampler.dualparal: blocks are denoised by one model; remove it, or set generators.teacher_steps: 0"
        )
    if plan.guidance_scale > 1:
        raise UserError(
            f"sampler.guidance_scale: with generators.teacher_steps it is the student's, which takes no guidance, found "
            f"{plan.guidance_scale:g}; set 1, and generators.teacher_guidance_scale for the teacher"
        )
    if teacher.steps > plan.num_inference_steps:
        raise UserError(
            f"generators.teacher_steps: found {teacher.steps} of sampler.num_inference_steps: {plan.num_inference_steps}; "
            "give at most as many"
        )


def check_runs_whole(ref: GeneratorRef) -> None:
    """Raise a UserError that names the key of what the teacher would not be loaded or laid out by."""
    for key, is_plain in (
        ("layout.parallel", ref.parallel == Degrees()),
        ("layout.attention", ref.attention == "native"),
        ("layout.offload", ref.offload == "none"),
        ("generators.remote_code", ref.remote_code is None),
    ):
        if not is_plain:
            raise UserError(f"{key}: not with generators.teacher_steps, whose two models run whole; leave it out")


def load_teacher(ref: GeneratorRef) -> Any:
    """The denoiser of the teacher of `ref`, in its precision and on its device. Adapters are the student's alone."""
    assert ref.teacher is not None
    own = replace(ref, path=ref.teacher.path, adapters=(), teacher=None)
    return load_pipeline(own, family_of(_PIPELINE), "sample").transformer


@contextmanager
def handing_off(pipe: Any, teacher: Any, ref: TeacherRef | None, arguments: dict[str, Any]) -> Iterator[None]:
    """Around one call of a student's pipeline with these arguments, of which `guidance_scale` must be at most 1.

    `teacher` is a denoiser; where there is none, `ref` is None, nothing is done.
    """
    if ref is None:
        yield
        return
    student = pipe.transformer
    pipe.transformer = HandOff(student, teacher, pipe.scheduler, ref, arguments.get("negative_prompt_embeds"))
    try:
        yield
    finally:
        pipe.transformer = student


class HandOff:
    """Stands in for the student's denoiser in its pipeline: at each call the timestep says who answers.

    Args:
        student: its denoiser; whatever is asked of this object but a prediction is its answer.
        teacher: the base model's denoiser.
        scheduler: the pipeline's, which has its timesteps by the time of the first call.
        ref: how many of them are the teacher's, and its guidance.
        negative: embeddings [n, tokens, width] of the negative prompts; needed where the teacher is guided.
    """

    def __init__(self, student: Any, teacher: Any, scheduler: Any, ref: TeacherRef, negative: Tensor | None) -> None:
        self.student, self.teacher, self.scheduler, self.ref, self.negative = student, teacher, scheduler, ref, negative

    def __getattr__(self, name: str) -> Any:
        return getattr(self.student, name)

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **arguments: Any
    ) -> tuple[Tensor, ...]:
        """Predictions [n, channels, frames, height, width] at `timestep`, [n] or [n, tokens]."""
        first = self._is_first(timestep)
        ask = partial(
            self.teacher if first else self.student, hidden_states=hidden_states, timestep=timestep, **arguments
        )
        prompted: tuple[Tensor, ...] = ask(encoder_hidden_states=encoder_hidden_states)
        if not first or self.ref.guidance_scale <= 1:
            return prompted
        unprompted: Tensor = ask(encoder_hidden_states=self.negative)[0]
        return (unprompted + self.ref.guidance_scale * (prompted[0] - unprompted),)

    def _is_first(self, timestep: Tensor) -> bool:
        if self.ref.steps == 0:
            return False
        steps = self.scheduler.timesteps.unique()  # ascending; schedulers of second order say each twice
        return bool(timestep.max() >= steps[-min(self.ref.steps, len(steps))])


def _config(folder: str, component: str) -> dict[str, Any]:
    file = Path(folder, component, "config.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a whole checkpoint") from error
    return found if isinstance(found, dict) else {}
