"""The search of plans: budgets, what is given up early, and going on after a kill. Plans are measured by formulas here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from infra.errors import UserError
from models.accelerate.genome import Space, space_of
from models.plan import SamplerPlan
from pipelines.pareto import pareto_svg, trials_csv
from pipelines.quality import QualityBudget, interval, lost, parse_budget, surely_misses, weighed
from pipelines.sampling import Sampler, planned, sampler_keys, sampler_plan
from pipelines.search import Search, Tried
from pipelines.trials import Evaluate, Measured, Refused

BASE = SamplerPlan(num_inference_steps=20, guidance_scale=1.75)
BUDGET = QualityBudget(judge=0.02)
BATCHES, SIZE = 6, 4


def formula(plan: SamplerPlan) -> tuple[float, float]:
    """Seconds and what is lost: fewer steps cost less and lose more, and a bend of 1.25 loses least."""
    bend = 0.0 if plan.sigmas is None else abs(plan.sigmas[1] - 0.9)
    return 0.05 * plan.num_inference_steps, 0.4 / plan.num_inference_steps**1.5 + bend / 50 - 0.4 / 20**1.5


def measured(plan: SamplerPlan, at: int) -> Measured:
    seconds, loss = formula(plan)
    scores = weighed(np.full(SIZE, 0.9 - loss))
    return Measured(scores, np.array([seconds]), np.full(SIZE, 60.0), plan.num_inference_steps)


def counting(seen: list[tuple[str, int]]) -> Evaluate:
    def evaluate(asked: Sequence[tuple[SamplerPlan, int]]) -> list[Measured | Refused]:
        seen.extend((plan.plan_id, at) for plan, at in asked)
        return [measured(plan, at) for plan, at in asked]

    return evaluate


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., Search]:
    space: Space = space_of(lambda plan: True, BASE, 3.0, ())
    reference = [measured(BASE, at) for at in range(BATCHES)]

    def make(evaluate: Evaluate, budget: QualityBudget = BUDGET, width: int = 1) -> Search:
        return Search(
            space, budget, reference, tmp_path / "search.log", "these", evaluate, lambda plan: True, width=width
        )

    return make


def test_budgets_are_read_or_refused_in_one_line() -> None:
    assert parse_budget("psnr=30").most == -30
    assert str(parse_budget(" accuracy = 0.01 ")) == "accuracy=0.01"
    for text in ("psnr", "accuracy=2", "quality=1", "judge=a", ""):
        with pytest.raises(UserError, match=r"^--budget: expected accuracy=0\.01") as error:
            parse_budget(text)
        assert "\n" not in str(error.value)


def test_a_loss_is_a_paired_difference_and_of_psnr_the_mean() -> None:
    theirs = np.array([[3.0, 3], [2, 4], [4, 4]])
    ours = np.array([[2.0, 3], [2, 4], [4, 4]])
    assert lost(QualityBudget(accuracy=0.01), ours, theirs) == pytest.approx(1 / 11)
    low, high = interval(QualityBudget(accuracy=0.01), ours, theirs)
    assert low == 0 and 1 / 11 < high < 0.34
    assert lost(QualityBudget(psnr=30), weighed([31, 33]), weighed([0, 0])) == -32


def test_a_plan_is_given_up_where_even_chance_does_not_explain_its_loss() -> None:
    theirs = weighed(np.ones(16))
    one_wrong, half_wrong = weighed([0.0, *[1.0] * 15]), weighed([0.0, 1.0] * 8)
    budget = QualityBudget(accuracy=0.01)
    assert not surely_misses(budget, one_wrong, theirs)
    assert surely_misses(budget, half_wrong, theirs)


def test_the_cheapest_plan_within_the_budget_is_found_and_hopeless_ones_end_early(
    search: Callable[..., Search],
) -> None:
    seen: list[tuple[str, int]] = []
    found = search(counting(seen))
    assert found.run(120, time.monotonic() + 300) == "trials"
    best = found.within()[0]
    # By the formula seven steps are the fewest, and of what the search begins with eight.
    assert best.plan.num_inference_steps == 7 and best.whole and best.samples == BATCHES * SIZE
    given_up = [tried for tried in found.tried if not tried.whole]
    assert given_up and all(tried.samples == SIZE and tried.loss > BUDGET.most for tried in given_up)
    assert len(seen) == sum(tried.samples // SIZE for tried in found.tried)
    costs, losses = zip(*((tried.seconds, tried.loss) for tried in found.front()), strict=True)
    assert list(costs) == sorted(costs) and list(losses) == sorted(losses, reverse=True)


def test_a_search_goes_on_where_it_was_killed(search: Callable[..., Search], tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def dies(asked: Sequence[tuple[SamplerPlan, int]]) -> list[Measured | Refused]:
        if len(seen) > 40:
            raise KeyboardInterrupt
        return counting(seen)(asked)

    first = search(dies)
    with pytest.raises(KeyboardInterrupt):
        first.run(60, time.monotonic() + 300)
    with (tmp_path / "search.log").open("ab") as journal:
        journal.write(b'{"op_code": 5, "trial')  # a kill in the middle of a line
    again = search(counting(seen))
    assert [tried.plan.plan_id for tried in again.tried] == [tried.plan.plan_id for tried in first.tried]
    seen.clear()
    assert again.run(30, time.monotonic() + 300) == "trials"
    assert {plan_id for plan_id, _ in seen}.isdisjoint(tried.plan.plan_id for tried in first.tried)
    assert len({tried.plan.plan_id for tried in again.tried}) == len(again.tried) == 30
    assert search(counting(seen)).run(30, time.monotonic() + 300) == "trials"


def test_a_plan_that_this_machine_cannot_follow_ends_no_search(search: Callable[..., Search]) -> None:
    def small(asked: Sequence[tuple[SamplerPlan, int]]) -> list[Measured | Refused]:
        return [
            Refused("layout.max_cache_bytes: too much") if plan.accelerate else measured(plan, at) for plan, at in asked
        ]

    found = search(small)
    found.run(20, time.monotonic() + 300)
    assert set(found.refused.values()) == {"layout.max_cache_bytes: too much"}
    assert len(found.tried) == 20 and not any(tried.plan.accelerate for tried in found.tried)
    assert search(small).refused == found.refused


def test_several_plans_at_once_are_measured_as_one_by_one(search: Callable[..., Search]) -> None:
    seen: list[tuple[str, int]] = []
    found = search(counting(seen), width=4)
    assert found.run(24, time.monotonic() - 1) == "seconds" and not found.tried
    found.run(24, time.monotonic() + 300)
    for tried in found.tried:
        assert (tried.seconds, tried.loss) == pytest.approx(formula(tried.plan))


def test_plans_are_the_keys_of_a_spec() -> None:
    space = space_of(lambda plan: True, BASE, 3.0, (1.0, 0.9))
    for genome in space.seeds():
        plan = space.plan(genome)
        assert sampler_plan(planned(Sampler(num_inference_steps=3), sampler_keys(plan))) == plan


def test_the_table_and_the_picture_hold_every_plan(search: Callable[..., Search]) -> None:
    found = search(counting([]))
    found.run(20, time.monotonic() + 300)
    table = trials_csv(found.tried, {tried.number for tried in found.front()}).splitlines()
    assert len(table) == 21
    for budget in (BUDGET, QualityBudget(psnr=30)):
        drawn = pareto_svg(found.tried, found.front(), budget, 1.0, found.within()[0])
        assert drawn.count('class="tried"') + drawn.count('class="given-up"') >= 20
        assert drawn.count('class="winner"') == 2 and "nan" not in drawn


def test_a_trial_is_the_same_after_its_journal() -> None:
    space = space_of(lambda plan: True, BASE, 3.0, ())
    plan = space.plan({**next(space.seeds()), "steps": 4, "bend": 1.3, "cache": "first_block"})
    tried = Tried(3, plan, 1.0, 2.0, 8, 0.1, 4, True)
    assert Tried.from_row(tried.as_row()) == tried
