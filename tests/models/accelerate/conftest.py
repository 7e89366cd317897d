"""A tiny random Wan, sampled with techniques and without, and its blocks counted by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.accelerate.course import Savings
from models.accelerate.registry import canonical
from models.early import Early
from models.generator import Generator, GeneratorRef
from models.noise import noise_key, standard_normal
from models.path import Path as States
from models.plan import SamplerPlan

VIDEO = (64, 64, 9)
PROMPTS = ["a cat", "a red dog that runs", "two boats", "the sea at night"]


@dataclass
class Sampling:
    """One generator for all tests of a session: what one plan leaves behind the next one would find."""

    generator: Generator
    counted: list[float] = field(default_factory=list)

    def __call__(
        self,
        plan: SamplerPlan,
        rows: list[int] | None = None,
        savings: Savings | None = None,
        states: States | None = None,
        early: Early | None = None,
    ) -> tuple[np.ndarray, int]:
        """Latents of PROMPTS, `rows` of them, and evaluations for each."""
        rows = list(range(len(PROMPTS))) if rows is None else rows
        shape = self.generator.latent_shape(*VIDEO)
        noise = np.stack([standard_normal(noise_key(0, prompt, 0), shape) for prompt in PROMPTS])
        negative = [""] * len(PROMPTS)
        conditions = self.generator.encode(PROMPTS, negative, [], replace(plan, guidance_scale=3.0))
        if plan.guidance_scale <= 1:
            del conditions["negative_prompt_embeds"]
        given = {name: value[rows] for name, value in conditions.items()}
        return self.generator.sample(given, noise[rows], plan, *VIDEO, 8.0, states, savings, early)

    @property
    def denoiser(self) -> Any:
        return self.generator._pipe("sample").transformer

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """Rows that each block is given, call after call, as the blocks themselves see it."""
        seen: list[int] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))) for block in self.denoiser.blocks
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="session")
def sampling(tiny_pack: Path) -> Sampling:
    return Sampling(Generator(GeneratorRef(str(tiny_pack / "generator"))))


@pytest.fixture(scope="session")
def plain(sampling: Sampling) -> Callable[[SamplerPlan], np.ndarray]:
    """Latents of all prompts by a plan, without its techniques; each made once."""
    made: dict[str, np.ndarray] = {}

    def latents(plan: SamplerPlan) -> np.ndarray:
        plan = replace(plan, accelerate=())
        if plan.plan_id not in made:
            made[plan.plan_id] = sampling(plan)[0]
        return made[plan.plan_id]

    return latents


@pytest.fixture(scope="session")
def plan_with() -> Callable[..., SamplerPlan]:
    """A plan of eight guided steps with these techniques, names or objects; `changes` are the plan's other fields."""

    def make(*techniques: str | dict[str, Any], **changes: Any) -> SamplerPlan:
        items = [{"technique": item} if isinstance(item, str) else item for item in techniques]
        plan = SamplerPlan(num_inference_steps=8, guidance_scale=3.0, max_sequence_length=16)
        return replace(plan, accelerate=canonical(items), **changes)

    return make


def technique(name: str, **settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps({"technique": name, **settings}))  # type: ignore[no-any-return]
