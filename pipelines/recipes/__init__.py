"""Recipes: the kinds of dataset. Each is one short file that says which stages a sample goes through."""

from __future__ import annotations

from types import ModuleType

from pipelines.recipes import curate, prompts, reflow, synthetic, trajectory

RECIPES: dict[str, ModuleType] = {
    "synthetic": synthetic,
    "reflow": reflow,
    "trajectory": trajectory,
    "prompts": prompts,
    "curate": curate,
}
