"""`ditmill tune`: the cheapest plan of a checkpoint that keeps a budget of quality, on prompts that the search did not see.

    <folder>/<stem>.json          the plan file, where a plan kept the budget on prompts that the search did not see
    <folder>/<stem>.csv, .svg     every plan that was tried, and the Pareto plot
    <folder>/<stem>/              the search's journal, and what it need not compute twice; not needed afterwards

The stem is made of the checkpoint's hash, the media shape and the budget.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra.errors import UserError
from infra.storage import make_folder, replacing
from models.accelerate.genome import follower
from models.generator import load_generator
from models.plan import SamplerPlan
from pipelines.chosen_plan import key_of
from pipelines.enumeration import PLANNED, Planned, planned_batch
from pipelines.identity import sample_ids
from pipelines.pareto import pareto_svg, trials_csv
from pipelines.plan_file import Cost, Held, PlanFile, plan_stem
from pipelines.quality import QualityBudget, interval, lost
from pipelines.records import expand_rows, unique_records
from pipelines.resolve import Resolved, code_version
from pipelines.sampling import sampler_keys
from pipelines.search import Search, Tried
from pipelines.trials import Evaluate, Measured, Prompts, Refused, measure, measure_reference, space
from stages.batch import Batch, Stage, texts
from stages.judge import JudgeQuality
from stages.score import ScoreMedia
from stages.screen import ScreenQuality

MOST_HELD_OUT = 6
"""Plans that are measured again on prompts that the search did not see, until one keeps the budget there."""

Say = Callable[[str], None]
Pool = Callable[[Prompts], Evaluate]
"""Where plans are tried on these prompts: `here`, or the actors of a cluster."""


def here(prompts: Prompts) -> Evaluate:
    """In this process, one after another."""

    def one(plan: SamplerPlan, at: int) -> Measured | Refused:
        try:
            return measure(prompts, plan, at)
        except UserError as error:
            return Refused(str(error))

    return lambda asked: [one(plan, at) for plan, at in asked]


@dataclass(frozen=True)
class Settings:
    """Args:
    calibration: prompts that the search sees.
    held_out: prompts that it does not see, on which its best plans are measured again.
    trials: most plans that are tried.
    seconds: most of the search, of wall time.
    width: plans that are tried at once.
    """

    calibration: int
    held_out: int
    trials: int = 200
    seconds: float = float("inf")
    width: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """How a search ended. `plan` is None where no plan kept the budget.

    refused: cheaper plans that missed it on prompts that the search did not see. not_followed: why others could not be tried.
    """

    stopped_by: str
    tried: int
    within: int
    plan: PlanFile | None
    refused: tuple[str, ...]
    files: dict[str, str]
    not_followed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        plan = None if self.plan is None else self.plan.model_dump(mode="json")
        own = ("stopped_by", "tried", "within", "refused", "not_followed", "files")
        return {**{name: getattr(self, name) for name in own}, "plan": plan}

    def lines(self) -> list[str]:
        """What a person reads at the end."""
        said = [
            f"{self.tried} plans tried ({self.stopped_by}), {self.within} of them within the budget on the search's prompts"
        ]
        if self.not_followed:
            said.append(f"  {len(self.not_followed)} others could not be followed, the first: {self.not_followed[0]}")
        said += [f"  refused: {why}" for why in self.refused]
        if self.plan is None:
            said.append("no plan kept the budget on prompts that the search did not see; search longer, or allow more")
        else:
            said += [f"{self.files['plan']}: {self.plan}", "  in a spec: sampler: {plan: auto}, or plan: and this file"]
        return said + [f"  {name}: {file}" for name, file in self.files.items() if name != "plan"]


def tune(run: Resolved, budget: QualityBudget, settings: Settings, folder: Path, say: Say, pool: Pool = here) -> Result:
    """Search plans for the one generator and bucket of `run`, whose own plan without techniques is what they are held to.

    Killed or not, the same call goes on where it was. UserErrors name the key.
    """
    generator = key_of(run.spec)
    bucket = run.spec.buckets[0]
    shape = (bucket.height, bucket.width, bucket.num_frames)
    stem = plan_stem(generator, shape, budget)
    work = folder / stem
    make_folder("--out", work)
    if load_generator(run.generators[0]).family is None:
        raise UserError(f"generators.model: {run.spec.generators[0].model} runs whole; its sampler has no plan to tune")
    seen, unseen = _prompts(run, budget, settings, work)
    evaluate = pool(seen)
    say(f"the plan without techniques on {len(seen)} prompts: {len(seen.batches)} batches of {seen.batch_size}")
    reference = measure_reference(seen, evaluate)
    search = Search(
        space(seen),
        budget,
        reference,
        work / "search.log",
        f"{seen.digest}-{seen.reference.plan_id}",
        evaluate,
        follower(load_generator(run.generators[0]).check_plan),
        settings.width,
        settings.seed,
    )
    if search.tried:
        say(f"going on after {len(search.tried)} plans")
    plain = Measured.joined(reference)
    stopped_by = search.run(
        settings.trials, time.monotonic() + settings.seconds, lambda tried: say(_told(tried, budget, plain.cost))
    )
    winner, refused = _held_out(budget, search, unseen, pool, say)
    files = {"plan": folder / f"{stem}.json", "table": folder / f"{stem}.csv", "plot": folder / f"{stem}.svg"}
    front = search.front()
    _write(files["table"], trials_csv(search.tried, {each.number for each in front}))
    _write(files["plot"], pareto_svg(search.tried, front, budget, plain.cost, None if winner is None else winner.tried))
    plan = None
    if winner is not None:
        plan = PlanFile(
            model=run.spec.generators[0].model,
            generator_id=generator,
            **bucket.model_dump(include={"height", "width", "num_frames"}),
            budget=budget,
            sampler=sampler_keys(winner.tried.plan),
            reference=sampler_keys(seen.reference),
            held_out=winner.held,
            made={
                "code_version": code_version(),
                "batch_size": seen.batch_size,
                "calibration": len(seen),
                "tried": len(search.tried),
                "refused": len(refused),
                "stopped_by": stopped_by,
            },
        )
        _write(files["plan"], plan.model_dump_json(indent=2) + "\n")
    else:
        del files["plan"]
    names = {name: str(file) for name, file in files.items()}
    return Result(
        stopped_by=stopped_by,
        tried=len(search.tried),
        within=len(search.within()),
        plan=plan,
        refused=tuple(refused),
        files=names,
        not_followed=tuple(search.refused.values()),
    )


@dataclass(frozen=True)
class _Winner:
    tried: Tried
    held: Held


def _held_out(
    budget: QualityBudget, search: Search, prompts: Prompts, pool: Pool, say: Say
) -> tuple[_Winner | None, list[str]]:
    """The cheapest plan that keeps the budget on prompts that the search did not see, and why cheaper ones were refused."""
    evaluate = pool(prompts)
    plain: Measured | None = None
    refused: list[str] = []
    for tried in islice(_distinct(search.within()), MOST_HELD_OUT):
        plain = plain or Measured.joined(measure_reference(prompts, evaluate))
        found = evaluate([(tried.plan, at) for at in range(len(prompts.batches))])
        if why := next((each.why for each in found if isinstance(each, Refused)), ""):
            refused.append(f"{summary(tried.plan)}: {why}")
            continue
        ours = Measured.joined([each for each in found if isinstance(each, Measured)])
        loss = lost(budget, ours.scores, plain.scores)
        said = f"{summary(tried.plan)}: {budget.in_words(loss)} on {len(prompts)} prompts that the search did not see"
        say(said)
        if not budget.allows(loss):
            refused.append(said)
            continue
        low, high = interval(budget, ours.scores, plain.scores)
        held = Held(samples=len(prompts), loss=loss, low=low, high=high, cost=_cost(ours), reference_cost=_cost(plain))
        return _Winner(tried, held), refused
    return None, refused


def _distinct(tried: Sequence[Tried]) -> Iterator[Tried]:
    """Plans, the cheapest first, without those that are hardly another: same solver, steps and techniques by name."""
    seen: set[tuple[Any, ...]] = set()
    for each in tried:
        kind = (each.plan.scheduler, each.plan.num_inference_steps, each.evaluations, round(each.loss, 9))
        if kind not in seen:
            seen.add(kind)
            yield each


def summary(plan: SamplerPlan) -> str:
    """A plan in a few words."""
    words = [
        f"{plan.num_inference_steps} steps",
        plan.scheduler + (f" {plan.solver_order}" if plan.solver_order else ""),
    ]
    words.append("given sigmas" if plan.sigmas is not None else "" if plan.shift is None else f"shift {plan.shift:g}")
    words.append(f"guidance {plan.guidance_scale:g}")
    for item in map(json.loads, plan.accelerate):
        numbers = {
            "first_block": "threshold",
            "gated_taylor": "threshold",
            "magcache": "threshold",
            "taylorseer": "interval",
        }
        names = {"guidance_reuse": "interval", "guidance_rescale": "factor"}
        key = (numbers | names).get(item["technique"])
        number = (
            f" {item['low']:g}-{item['high']:g}" if key is None and "low" in item else f" {item[key]:g}" if key else ""
        )
        words.append(item["technique"] + number)
    return ", ".join(word for word in words if word)


def _told(tried: Tried, budget: QualityBudget, plain: float) -> str:
    share = f"{tried.seconds:.3g} s, {tried.seconds / plain:.0%}" if plain else f"{tried.seconds:.3g} s"
    given_up = "" if tried.whole else f" (given up after {tried.samples} prompts)"
    return f"{tried.number}: {share}, {budget.in_words(tried.loss)}{given_up}: {summary(tried.plan)}"


def _cost(measured: Measured) -> Cost:
    return Cost(seconds=measured.cost, evaluations=float(measured.evaluations.mean()), nfe=measured.nfe)


def _prompts(run: Resolved, budget: QualityBudget, settings: Settings, work: Path) -> tuple[Prompts, Prompts]:
    """The prompts that the search sees, and those that it does not."""
    wanted = settings.calibration + settings.held_out
    rows = list(islice(_rows(run), wanted))
    if len(rows) < wanted:
        raise UserError(
            f"--calibration: expected {settings.calibration} prompts to search on and {settings.held_out} others for what is "
            f"found, of the bucket's shape and not expanded, found {len(rows)} in prompts; give fewer, or more prompts"
        )
    judging = _judging(run) if budget.measure == "judge" else ()
    size = run.spec.layout.batch_size
    parts = (rows[: settings.calibration], rows[settings.calibration :])
    seen, unseen = (
        Prompts(
            generator=run.generators[0],
            reference=replace(run.plan, accelerate=()),
            budget=budget,
            batches=tuple(_batch(run, part[start : start + size]) for start in range(0, len(part), size)),
            batch_size=size,
            threads=run.spec.layout.threads,
            judging=judging,
            folder=str(work / "kept"),
        )
        for part in parts
    )
    return seen, unseen


def _rows(run: Resolved) -> Iterator[dict[str, Any]]:
    """Prompt rows of the bucket's shape, as they stand in the records."""
    bucket = run.spec.buckets[0]
    for record in unique_records(run.spec):
        shape = (record.height, record.width, record.num_frames)
        if not record.is_bad and shape == (bucket.height, bucket.width, bucket.num_frames):
            yield expand_rows(record, [], "", keep_original=True)[0]


def _batch(run: Resolved, rows: Sequence[dict[str, Any]]) -> Batch:
    ids = sample_ids([row["prompt_id"] for row in rows], 0, run.generator_ids[0], run.plan.plan_id)
    places = np.arange(len(rows))
    table = pa.Table.from_pylist(list(rows), PLANNED)
    return planned_batch(Planned(places, texts(ids), np.zeros_like(places), table, 0), run.spec.seed, {})


def _judging(run: Resolved) -> tuple[Stage, ...]:
    """The judge that scores every clip, and what decomposes its prompts. UserError where the spec has none."""
    stages = [stage for stage in run.scoring() if not isinstance(stage, (ScoreMedia, ScreenQuality))]
    if not stages:
        raise UserError("--budget: judge needs a judge, found judge.backend: none; name one, or use psnr=30")
    *before, judge = stages
    assert isinstance(judge, JudgeQuality)
    return (*before, replace(judge, screen=None))


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
