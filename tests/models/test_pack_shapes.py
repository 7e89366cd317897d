"""pack://shapes as it is shipped: small, safe, and it makes what it is asked for. How well, `ditmill bench pack` says."""

from __future__ import annotations

import numpy as np
import pytest

from models.loading import GeneratorRef
from models.multimodal import Multimodal, MultimodalRef, evenly_spaced
from models.pack import SHIPPED
from models.pack.grammar import sample_scenes
from models.pack.phrases import describe, parse
from models.pack.train.expander import measure
from models.pack.train.loop import stream
from models.pack.train.questions import HEAD, SHORT, TAIL
from models.pack.world import render
from models.plan import SamplerPlan
from models.source import resolve
from pipelines.sections import PACK_GUIDANCE
from tests.bench.support.pack_parts import generate, held_out

SHAPES = SHIPPED["shapes"]


def test_it_is_small_and_holds_no_pickle() -> None:
    files = [path for path in SHAPES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 48e6
    assert max(path.stat().st_size for path in files) < 15 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_it_generates_what_it_is_asked_for() -> None:
    asked = held_out(6, 1, kinds=("one",))
    plan = SamplerPlan(num_inference_steps=20, guidance_scale=PACK_GUIDANCE)
    made = generate(GeneratorRef(resolve("pack://shapes", "generator")), plan, asked, 6, 1, lambda _: None)
    for name in ("count", "colour", "background"):
        assert np.mean([right[name] for right in made.right]) >= 5 / 6, name
    assert any(all(right.values()) for right in made.right)


@pytest.fixture(scope="module")
def judge() -> Multimodal:
    return Multimodal(MultimodalRef(resolve("pack://shapes", "judge")))


def test_its_judge_tells_a_description_from_another(judge: Multimodal) -> None:
    scenes = sample_scenes(stream(5, 0), 24, kinds=("one",), split="held_out")
    frames = evenly_spaced(render(scenes, range(24)), 8)
    asked = [
        [HEAD.format(media="video") + describe(each) + TAIL for each in (scene, scenes[at - 1])]
        for at, scene in enumerate(scenes)
    ]
    own, other = judge.p_yes(frames, asked).T
    assert np.mean(own > other) >= 0.9


def test_its_captions_are_of_the_grammar(judge: Multimodal) -> None:
    scenes = sample_scenes(stream(6, 0), 4, kinds=("one",), split="held_out")
    frames = evenly_spaced(render(scenes, range(4)), 8)
    captions = [texts[0] for texts in judge.caption(frames, [SHORT.format(media="video")], 48)]
    for scene, caption in zip(scenes, captions, strict=True):
        said = parse(caption)
        assert said is not None and said.figures[0].colour == scene.figures[0].colour


def test_its_expander_keeps_what_was_said() -> None:
    found = measure(resolve("pack://shapes", "expander"), 3, count=40, variants=16)
    right, asked = found["shares"]["keeps"]
    assert right >= 0.85 * asked
    assert found["distinct"] >= 8
