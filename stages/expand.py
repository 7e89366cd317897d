"""ExpandPrompts: a language model rewrites each prompt record into several prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.language import LanguageRef, load_language
from stages.batch import Batch, jsons


@dataclass(frozen=True)
class ExpandPrompts:
    """Reads `prompt`; adds `expansions`, a JSON list of `variants` texts for each record. No record is dropped."""

    model: LanguageRef
    instruction: str  # contains {prompt}
    variants: int = 2
    temperature: float = 0.8
    max_new_tokens: int = 96
    seed: int = 0
    threads: int = 1

    name: ClassVar[str] = "expand"
    reads: ClassVar[tuple[str, ...]] = ("prompt",)
    adds: ClassVar[tuple[str, ...]] = ("expansions",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        load_language(self.model)

    def __call__(self, batch: Batch) -> Batch:
        expansions = load_language(self.model).expand(
            list(batch["prompt"]), self.instruction, self.variants, self.temperature, self.max_new_tokens, self.seed
        )
        return batch | {"expansions": jsons(expansions)}
