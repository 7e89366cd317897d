from __future__ import annotations

import numpy as np
import pytest

from models.language import LanguageRef, load_language
from stages.batch import load_json, texts
from stages.expand import ExpandPrompts


@pytest.fixture
def stage(tiny_pack):
    return ExpandPrompts(LanguageRef(str(tiny_pack / "expander")), "Rewrite: {prompt}", variants=2, max_new_tokens=6)


def test_expand_adds_variants_and_drops_nothing(stage):
    stage.load()
    prompts = ["a cat", "", "x" * 100_000, "a cat", "\ud800"]
    out = stage({"prompt": texts(prompts), "seed": np.arange(5)})
    expansions = load_json(out["expansions"])
    assert [len(variants) for variants in expansions] == [2] * 5
    assert list(out["prompt"]) == prompts and list(out["seed"]) == [0, 1, 2, 3, 4]
    assert expansions[0] == expansions[3]
    assert expansions[2] == [prompts[2]] * 2
    assert expansions[0] == load_language(stage.model).expand(["a cat"], "Rewrite: {prompt}", 2, 0.8, 6, 0)[0]


def test_expand_takes_its_settings_from_the_stage(stage):
    one = ExpandPrompts(stage.model, stage.instruction, variants=3, temperature=0.0, max_new_tokens=6)
    (variants,) = load_json(one({"prompt": texts(["a cat"])})["expansions"])
    assert len(variants) == 3 and len(set(variants)) == 1
