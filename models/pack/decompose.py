"""Prompts of the small world taken apart by its grammar: what a language model does elsewhere, without any error.

The judge was taught whole descriptions, shorter ones among them. So each fact is asked about as a description that says the
shapes and little else: which shapes there are, the colour of one, then its size and motion beside the colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models.facts import WHOLE
from models.pack.grammar import Figure, Scene, Shot
from models.pack.phrases import describe, parse


def decompose(prompts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """For each prompt {question, needs}, as DecomposePrompts takes them; none for a prompt that is not of the grammar."""
    scenes = map(parse, prompts)
    return [[] if scene is None else facts_of(scene) for scene in scenes]


def facts_of(scene: Scene) -> list[dict[str, Any]]:
    """One fact for the shapes and how many there are, one for each colour, size, motion and background that is said."""
    facts = [_fact(_said(scene, ()))]
    coloured = [0] * len(scene.figures)  # where the colour of a figure, or else its shape, is asked
    for at, figure in enumerate(scene.figures):
        if figure.colour is not None:
            coloured[at] = len(facts)
            facts.append(_fact(_said(scene, (), at, "colour"), 0))
    for at, figure in enumerate(scene.figures):
        for name in ("size", "motion"):
            if getattr(figure, name) is not None:
                facts.append(_fact(_said(scene, ("colour",), at, name), coloured[at]))
    for at, shot in enumerate(scene.shots):
        if shot.background is not None:
            bare = _said(scene, ()).shots
            alone = replace(bare[at], background=shot.background)
            facts.append(_fact(Scene((*bare[:at], alone, *bare[at + 1 :])), 0))
    return facts


def _said(scene: Scene, names: tuple[str, ...], at: int = -1, name: str = "") -> Scene:
    """The scene's shapes, with `names` of all figures and `name` of the one at `at`."""
    figures = iter(
        Figure(
            shape=figure.shape, **{each: getattr(figure, each) for each in (*names, *([name] if place == at else []))}
        )
        for place, figure in enumerate(scene.figures)
    )
    return Scene(tuple(Shot(tuple(next(figures) for _ in shot.figures)) for shot in scene.shots))


def _fact(scene: Scene, *needs: int) -> dict[str, Any]:
    return {"question": WHOLE.replace("{prompt}", describe(scene)), "needs": list(needs)}
