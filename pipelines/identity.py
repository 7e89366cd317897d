"""What makes a prompt, a generator and a sample themselves.

Every id is 128 bits of BLAKE2b in hex over a domain-separated, versioned and unambiguous encoding. An id that changes
plans its sample again, so what enters one is a promise: the tests hold golden values, and a new encoding takes a new
version. The noise of a sample is `models.noise.noise_key`; the id of a sampler plan is `models.plan.SamplerPlan.plan_id`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

PROMPT_DOMAIN = "ditmill/prompt/v1"
CLIP_DOMAIN = "ditmill/clip/v1"
SOURCE_DOMAIN = "ditmill/source/v1"
GENERATOR_DOMAIN = "ditmill/generator/v1"
SAMPLE_DOMAIN = "ditmill/sample/v1"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a bucket gives a sample: its media's shape. One frame is an image."""

    height: int
    width: int
    num_frames: int
    fps: float


@dataclass(frozen=True, slots=True)
class Input:
    """Media that a prompt is conditioned on. `start` and `end` are seconds, None for the whole."""

    role: str  # first_frame, last_frame, video, mask, audio, or what a family asks for
    uri: str
    sha256: str = ""  # of the file's bytes; empty where they could not be read
    start: float | None = None
    end: float | None = None


def prompt_id(
    prompt: str,
    *,
    inputs: Sequence[Input] = (),
    negative_prompt: str = "",
    shape: Shape,
    seed: int,
    own_id: str = "",
    expander: str = "",
    variant: int = 0,
) -> str:
    """The id of one prompt variant, 32 hex digits.

    `prompt` is the record's own text also where an expander has rewritten it: the expander's fingerprint and the variant's
    number stand for the new text. So the id is known before the language model has run, and of two runs that expand the
    same record at once the first commit wins. Inputs count by content and not by place; tags and licences do not count.
    """
    return _hash(
        PROMPT_DOMAIN,
        prompt,
        [[item.role, item.sha256 or f"uri:{item.uri}", _number(item.start), _number(item.end)] for item in inputs],
        negative_prompt,
        [int(shape.height), int(shape.width), int(shape.num_frames), float(shape.fps)],
        int(seed),
        own_id,
        expander,
        int(variant),
    )


def clip_id(sha256: str, start: float | None, end: float | None, shape: Shape) -> str:
    """The `prompt_id` of a clip of a file with this content, 32 hex digits: where the file lies, and what is said of it, do
    not count. `shape` is of what is kept of it; without start and end it is all of the file."""
    sides = [int(shape.height), int(shape.width), int(shape.num_frames), float(shape.fps)]
    return _hash(CLIP_DOMAIN, sha256, _number(start), _number(end), sides)


def source_id(uri: str, index: str) -> str:
    """The id of a file of a source that is cut as `index` says, 32 hex digits."""
    return _hash(SOURCE_DOMAIN, uri, index)


def generator_id(
    model_sha256: str,
    adapters: Iterable[tuple[str, float]] = (),
    teacher_steps: int = 0,
    teacher: tuple[str, float] | None = None,
) -> str:
    """The id of a checkpoint with its adapters, (sha256, weight) in the order in which they are applied; 32 hex digits.

    `teacher` is the content hash and guidance_scale of the model that takes the first `teacher_steps` steps, if any does.
    """
    values: list[Any] = [model_sha256, [[sha256, float(weight)] for sha256, weight in adapters], int(teacher_steps)]
    if teacher is not None:
        values.append([teacher[0], float(teacher[1])])
    return _hash(GENERATOR_DOMAIN, *values)


def sample_id(prompt_id: str, sample_index: int, generator_id: str, plan_id: str) -> str:
    """The id of one sample, 32 hex digits."""
    return sample_ids([prompt_id], sample_index, generator_id, plan_id)[0]


def sample_ids(prompt_ids: Iterable[str], sample_index: int, generator_id: str, plan_id: str) -> list[str]:
    """`sample_id` of many prompts, about 0.4 microseconds each: a resume makes all of a dataset's ids again.

    The encoding is one line each for domain, generator, plan and sample index, then the prompt's id. What does not change is
    hashed once, and all of it fits BLAKE2b's block of 128 bytes.
    """
    for name, value in (("generator_id", generator_id), ("plan_id", plan_id)):
        if "\n" in value:  # a line break would let two different samples share an encoding
            raise ValueError(f"{name}: expected one line, found {value!r}")
    prefix = f"{SAMPLE_DOMAIN}\n{generator_id}\n{plan_id}\n{int(sample_index)}\n"
    start = blake2b(prefix.encode(), digest_size=16).copy
    ids = []
    for prompt in prompt_ids:
        state = start()
        state.update(prompt.encode())
        ids.append(state.hexdigest())
    return ids


def _hash(domain: str, *values: Any) -> str:
    # ASCII-only JSON: lone surrogates, which UTF-8 cannot hold, still have an encoding
    text = json.dumps([domain, *values], ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
