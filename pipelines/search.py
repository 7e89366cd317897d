"""The search for cheap plans within a budget: NSGA-II (Deb et al. 2002) over cost and loss, by optuna.

ECAD (Aggarwal et al. 2025, arXiv 2506.15682) searches a checkpoint's caching schedules this way; here it is the whole plan.
Twice the budget is a constraint by Deb's rule: of two plans outside of it the nearer one is better. What lies between is
cheap and nearly good enough, and its children are where the answer is. A trial goes through its prompts in growing steps
and ends as soon as its loss surely misses the budget; what it has shown by then stands for it. Every trial is in a journal,
so that a search that was killed goes on.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.errors import UserError
from models.accelerate.genome import Choice, Dimension, Space, Whole
from models.plan import SamplerPlan
from pipelines.quality import QualityBudget, lost, surely_misses
from pipelines.trials import Evaluate, Measured, Refused

POPULATION = 12
SPREAD = 5.0
"""Of crossover and mutation (eta): small, as a few hundred trials have to reach far."""
MUTATED = 0.2
"""Share of a child's numbers."""
MOST_REPEATED = 200
"""Genomes of plans that are known, in a row, after which the space counts as searched."""


@dataclass(frozen=True)
class Tried:
    """A plan that was tried on `samples` prompts: on all of them, unless it was given up (not `whole`)."""

    number: int
    plan: SamplerPlan
    seconds: float
    """Of denoising a sample."""
    evaluations: float
    """Block evaluations of a sample."""
    nfe: int
    loss: float
    samples: int
    whole: bool

    def as_row(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        own = {
            name: getattr(self, name)
            for name in ("number", "seconds", "evaluations", "nfe", "loss", "samples", "whole")
        }
        return {**own, "plan": json.loads(self.plan.to_json())}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Tried:
        return cls(**{**row, "plan": SamplerPlan.from_dict(row["plan"])})


class Search:
    """Args:
    space: what plans are made of.
    budget: what they may lose.
    reference: the unaccelerated plan on each batch of prompts, in order.
    journal: its file.
    name: of what is searched: trials of another name are left alone.
    evaluate: see `Evaluate`.
    follows: whether the checkpoint can follow a plan.
    width: plans that are tried at once.
    """

    def __init__(
        self,
        space: Space,
        budget: QualityBudget,
        reference: Sequence[Measured],
        journal: Path,
        name: str,
        evaluate: Evaluate,
        follows: Callable[[SamplerPlan], bool],
        width: int = 1,
        seed: int = 0,
    ) -> None:
        self.space, self.budget, self.reference = space, budget, reference
        self.evaluate, self.follows, self.width = evaluate, follows, width
        self._study = _study(journal, name, seed)
        if not self._study.trials:
            for genome in space.seeds():
                self._study.enqueue_trial(genome)
        said = [trial.user_attrs for trial in self._study.trials]
        self.tried = [Tried.from_row(attributes["tried"]) for attributes in said if "tried" in attributes]
        self.refused: dict[str, str] = dict(attributes["refused"] for attributes in said if "refused" in attributes)
        """Why plans could not be followed, by plan_id."""

    def run(self, most_trials: int, ends: float, say: Callable[[Tried], None] = lambda tried: None) -> str:
        """Try plans until there are `most_trials`, or until `ends`, a time of time.monotonic; why it stopped."""
        repeated = 0
        while len(self.tried) < most_trials:
            if time.monotonic() >= ends:
                return "seconds"
            asked = [trial for trial in (self._ask() for _ in range(self.width)) if trial is not None]
            repeated = 0 if asked else repeated + self.width
            if repeated >= MOST_REPEATED:
                return "nothing new"
            for (trial, plan), found in zip(asked, self._try([plan for _, plan in asked]), strict=True):
                if isinstance(found, Refused):
                    self._refuse(trial, plan, found.why)
                else:
                    say(self._tell(trial, found))
        return "trials"

    def within(self) -> list[Tried]:
        """Plans that kept the budget on all prompts, the cheapest first."""
        kept = [tried for tried in self.tried if tried.whole and self.budget.allows(tried.loss)]
        return sorted(kept, key=lambda tried: (tried.seconds, tried.evaluations))

    def front(self) -> list[Tried]:
        """Plans that no other one beats in both cost and loss, the cheapest first."""
        best: list[Tried] = []
        for tried in sorted((each for each in self.tried if each.whole), key=lambda each: (each.seconds, each.loss)):
            if not best or tried.loss < best[-1].loss:
                best.append(tried)
        return best

    def _ask(self) -> tuple[Any, SamplerPlan] | None:
        """The next trial with its plan; None where it is one that is known, or that the checkpoint cannot follow."""
        trial = self._study.ask(_distributions(self.space.dimensions))
        plan = self.space.plan(trial.params)
        known = next((tried for tried in self.tried if tried.plan.plan_id == plan.plan_id), None)
        if known is not None:
            self._say(trial, known)
            return None
        if plan.plan_id in self.refused or not self.follows(plan):
            self._refuse(trial, plan, self.refused.get(plan.plan_id, "the checkpoint cannot follow it"))
            return None
        return trial, plan

    def _try(self, plans: Sequence[SamplerPlan]) -> list[Tried | Refused]:
        """Batch by batch, then two at a time, then four: a plan that surely misses the budget is given up between."""
        parts: list[list[Measured]] = [[] for _ in plans]
        refused: dict[int, Refused] = {}
        alive = list(range(len(plans)))
        for rung in _rungs(len(self.reference)):
            if not alive:
                break
            found = self.evaluate([(plans[number], at) for number in alive for at in rung])
            for place, number in enumerate(alive):
                for each in found[place * len(rung) : (place + 1) * len(rung)]:
                    if isinstance(each, Refused):
                        refused[number] = each
                    else:
                        parts[number].append(each)
            alive = [number for number in alive if number not in refused and not self._is_hopeless(parts[number])]
        return [
            refused[at] if at in refused else self._tried(plan, measured)
            for at, (plan, measured) in enumerate(zip(plans, parts, strict=True))
        ]

    def _is_hopeless(self, parts: Sequence[Measured]) -> bool:
        return surely_misses(
            self.budget, Measured.joined(parts).scores, Measured.joined(self.reference[: len(parts)]).scores
        )

    def _tried(self, plan: SamplerPlan, parts: Sequence[Measured]) -> Tried:
        made, theirs = Measured.joined(parts), Measured.joined(self.reference[: len(parts)])
        return Tried(
            number=len(self.tried),
            plan=plan,
            seconds=made.cost,
            evaluations=float(made.evaluations.mean()),
            nfe=made.nfe,
            loss=lost(self.budget, made.scores, theirs.scores),
            samples=len(made.scores),
            whole=len(parts) == len(self.reference),
        )

    def _tell(self, trial: Any, tried: Tried) -> Tried:
        tried = replace(tried, number=len(self.tried))
        self.tried.append(tried)
        trial.set_user_attr("tried", tried.as_row())
        self._say(trial, tried)
        return tried

    def _refuse(self, trial: Any, plan: SamplerPlan, why: str) -> None:
        import optuna

        self.refused[plan.plan_id] = why
        trial.set_user_attr("refused", [plan.plan_id, why])
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _say(self, trial: Any, tried: Tried) -> None:
        trial.set_constraint("budget", tried.loss - self.budget.nearly)
        self._study.tell(trial, [tried.seconds, tried.loss])


def _rungs(batches: int) -> Iterator[range]:
    """Numbers of batches: the first, the second, then twice as many each time."""
    at, count = 0, 1
    while at < batches:
        yield range(at, min(at + count, batches))
        at, count = at + count, max(1, at + count)


def _study(journal: Path, name: str, seed: int) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("tune: optuna is not installed; pip install optuna, or run make install") from error
    from optuna.samplers import nsgaii
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _whole_lines(journal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its journal is experimental
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
        # Another seed after each start: the same one would draw the first trials again.
        study.sampler = optuna.samplers.NSGAIISampler(
            population_size=POPULATION,
            crossover=nsgaii.SBXCrossover(eta=SPREAD),
            mutation=nsgaii.PolynomialMutation(eta=SPREAD),
            mutation_prob=MUTATED,
            seed=seed + len(study.trials),
        )
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def _whole_lines(journal: Path) -> None:
    """Cut off what a killed writer has left of a line: the next one would be written behind it."""
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def _distributions(dimensions: dict[str, Dimension]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for name, dimension in dimensions.items():
        if isinstance(dimension, Choice):
            found[name] = CategoricalDistribution(dimension.values)
        elif isinstance(dimension, Whole):
            found[name] = IntDistribution(dimension.low, dimension.high, log=dimension.log)
        else:
            found[name] = FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return found
