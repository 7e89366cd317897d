"""Techniques in a batch of which some samples are stopped: what they keep of each row goes on with its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models.accelerate.course import Savings
from models.early import Early
from models.plan import SamplerPlan

STEPS, LAYERS = 8, 5
GOES_ON, STOPPED = [1, 3], [0, 2]
ITEMS: list[dict[str, Any]] = [
    {"technique": "first_block", "threshold": 0.25},
    {"technique": "gated_taylor", "threshold": 0.3, "warmup": 2, "cooldown": 0},
    {"technique": "magcache", "ratios": [1.0, 0.99], "threshold": 1.0},
    {"technique": "taylorseer", "interval": 3},
    {"technique": "taylorseer", "interval": 3, "order": 2, "keep": "last"},
    {"technique": "schedule", "steps": [*(["all", "1.attn1 *.ffn"] * 3), "", "all"]},
    {"technique": "guidance_reuse", "interval": 3},
    {"technique": "guidance_rescale"},
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: " ".join(map(str, item.values()))[:30])
def test_what_goes_on_is_what_it_is_beside_all_others(
    item: dict[str, Any], sampling: Any, plan_with: Callable[..., SamplerPlan]
) -> None:
    plan, together, left = plan_with(item), Savings(), Savings()
    whole, _ = sampling(plan, savings=together)
    scores = np.array([0.1, 0.9, 0.2, 0.8])
    early = Early(0.9, 1, np.full(4, 0.5), np.zeros(4, bool), lambda clips, start: scores)
    part, _ = sampling(plan, savings=left, early=early)
    assert early.sizes.tolist() == [0, 2, 0, 2]
    np.testing.assert_allclose(part[GOES_ON], whole[GOES_ON], atol=2e-4, rtol=0)
    if together.facts and item["technique"] != "guidance_rescale":
        assert [left.facts[row] for row in GOES_ON] == [together.facts[row] for row in GOES_ON]
        assert all(left.facts[row]["block_evaluations"] == 2 * early.step * LAYERS for row in STOPPED)
