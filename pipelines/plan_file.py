"""Plan files: what `ditmill tune` found for one checkpoint at one media shape, and which of them a run takes.

`sampler.plan` names one, a folder of them, or says `auto`: the folder `plans` beside the dataset. It is resolved once for a
dataset: dataset.json keeps what was found, and a later run takes that, whatever lies in the folder by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from infra.errors import UserError
from pipelines.quality import QualityBudget
from pipelines.sections import Section

AUTO = "auto"
FOLDER = "plans"
KEY = "sampler.plan"


class Cost(Section):
    """Of one sample."""

    seconds: float = Field(ge=0)
    evaluations: float = Field(ge=0)
    nfe: int = Field(ge=0)


class Held(Section):
    """What the plan showed on prompts that the search did not see, beside the plan without techniques from the same noise."""

    samples: int = Field(ge=1)
    loss: float
    low: float
    high: float
    cost: Cost
    reference_cost: Cost


class PlanFile(Section):
    """A plan, what it is for, and what was measured of it."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    version: Literal[1] = 1
    model: str
    generator_id: str
    height: int
    width: int
    num_frames: int
    budget: QualityBudget
    sampler: dict[str, Any]
    """Keys of the spec's `sampler`."""
    reference: dict[str, Any]
    """Those of the plan that it was compared with."""
    held_out: Held
    made: dict[str, Any] = Field({})
    """How the search went, and by which versions."""

    @property
    def stem(self) -> str:
        """Name of its file, without the ending."""
        return plan_stem(self.generator_id, (self.height, self.width, self.num_frames), self.budget)

    def __str__(self) -> str:
        held = self.held_out
        times = held.reference_cost.seconds / held.cost.seconds if held.cost.seconds else 1.0
        ends = (held.high, held.low) if self.budget.measure == "psnr" else (held.low, held.high)
        first, second = map(self.budget.number, ends)
        return (
            f"{times:.1f}x less denoising, {self.budget.in_words(held.loss)} (95%: {first} to {second}) on {held.samples} "
            f"prompts that the search did not see"
        )


@dataclass(frozen=True)
class Chosen:
    """The plan that `sampler.plan` was resolved to."""

    asked: dict[str, Any]
    """What the spec said."""
    file: str
    plan: PlanFile
    kept: bool = False
    """Whether dataset.json had it."""

    def as_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "file": self.file, **self.plan.model_dump(mode="json")}

    def __str__(self) -> str:
        how = "as the dataset has it (--replan resolves it anew)" if self.kept else Path(self.file).name
        return f"{KEY}: {self.asked['plan']}: {how}: {self.plan}"


def plan_stem(generator_id: str, shape: tuple[int, int, int], budget: QualityBudget) -> str:
    return f"{generator_id[:12]}-{'x'.join(map(str, shape))}-{budget.name}"


def plans_folder(output_uri: str) -> Path:
    """Where `auto` looks: beside the dataset; of one on object storage, in the working directory."""
    return Path(FOLDER).resolve() if "://" in output_uri else Path(output_uri).resolve().parent / FOLDER


def read_plan(file: Path) -> PlanFile:
    """UserError where it cannot be read, or is none."""
    try:
        return PlanFile.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = _why(error)
        raise UserError(f"{KEY}: {file} is no plan file ({said}); make one with `ditmill tune`") from error


def read_kept(values: Any) -> Chosen | None:
    """What dataset.json keeps; None where that is nothing."""
    if not isinstance(values, dict):
        return None
    try:
        return Chosen(dict(values["asked"]), str(values["file"]), PlanFile.model_validate(values), kept=True)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{KEY}: what dataset.json keeps of it cannot be read ({_why(error)}); resolve it anew with --replan"
        ) from error


def find_plans(
    named: str,
    output_uri: str,
    generator_id: str,
    model: str,
    shape: tuple[int, int, int],
    budget: QualityBudget | None,
) -> list[tuple[Path, PlanFile]]:
    """Plan files that `named` means and that are for this checkpoint, shape and budget, the cheapest first.

    A plan is within a budget that it kept on the prompts that its search did not see. UserError where there is none.
    """
    place = plans_folder(output_uri) if named == AUTO else Path(named)
    if place.is_file():
        found = [(place, read_plan(place))]
    else:
        found = [(file, read_plan(file)) for file in sorted(place.glob("*.json"))]
    wanted = f"{model} ({generator_id[:12]}) at {'x'.join(map(str, shape))}"
    mend = f"make one with `ditmill tune SPEC --budget {budget or 'accuracy=0.01'}`"
    fits = [
        (file, plan)
        for file, plan in found
        if plan.generator_id == generator_id and (plan.height, plan.width, plan.num_frames) == shape
    ]
    if not fits:
        others = ", ".join(sorted({f"{plan.model} ({plan.generator_id[:12]}) {_shape(plan)}" for _, plan in found}))
        raise UserError(f"{KEY}: {place} has no plan for {wanted}, found {others or 'none'}; {mend}")
    if budget is None:
        kinds = sorted({str(plan.budget) for _, plan in fits})
        if len(kinds) > 1:
            raise UserError(f"sampler.budget: {place} has plans of {', '.join(kinds)} for {wanted}; say which you want")
        within = fits
    else:
        within = [(file, plan) for file, plan in fits if _is_within(plan, budget)]
    if not within:
        have = ", ".join(f"{plan.budget.in_words(plan.held_out.loss)}" for _, plan in fits)
        raise UserError(
            f"{KEY}: no plan in {place} for {wanted} is within sampler.budget {budget}, found {have}; {mend}"
        )
    return sorted(within, key=lambda item: item[1].held_out.cost.seconds)


def _is_within(plan: PlanFile, budget: QualityBudget) -> bool:
    return plan.budget.measure == budget.measure and budget.allows(plan.held_out.loss)


def _shape(plan: PlanFile) -> str:
    return f"at {plan.height}x{plan.width}x{plan.num_frames}"


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    return str(error).splitlines()[0]
