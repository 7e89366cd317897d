"""A sampler plan as numbers that a search can vary: solver, steps and their noise levels, guidance, and one cache.

Every genome has every dimension, whether or not its plan uses it, so that crossover always has two parents to mix. Noise
levels of N steps are those of AutoDiffusion's search (Li et al. 2023, arXiv 2309.10438) cut down to two numbers, shift s and
bend b, as few trials can settle:

    u = 1 - (k / N)^b,   sigma = s u / (1 + (s - 1) u),   k = 0 .. N - 1

b = 1 is the scheduler's own even spacing; a larger b spends more of the steps at high noise, a smaller one at low noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor, log10
from typing import Any

from infra.errors import UserError
from models.accelerate.registry import canonical
from models.accelerate.settings import TECHNIQUE
from models.plan import SamplerPlan

Genome = Mapping[str, Any]

GIVEN = "given"
"""The solver of the plan that is varied."""
NONE = "none"
CACHES = ("first_block", "gated_taylor", "taylorseer", "magcache")
GUIDANCE = ("guidance_interval", "guidance_reuse", "guidance_rescale")
SOLVERS = ("unipc/2", "unipc/3", "dpmpp/2", "euler")
"""Scheduler and order, as a spec names them."""

EVEN = 0.05
"""A bend this close to 1 is none, and a guidance technique this close to doing nothing is left out."""


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]


@dataclass(frozen=True)
class Whole:
    low: int
    high: int
    log: bool = False


@dataclass(frozen=True)
class Real:
    low: float
    high: float
    log: bool = False


Dimension = Choice | Whole | Real


@dataclass(frozen=True)
class Space:
    """Args:
    base: the plan that is varied, without techniques.
    shift: of its noise levels, None where its scheduler has none to vary.
    bends: whether sigmas may be given.
    solvers: those of SOLVERS that the checkpoint can follow.
    techniques: those that its denoiser and its layout can be given.
    ratios: of MagCache, as measured.
    """

    base: SamplerPlan
    shift: float | None
    bends: bool
    solvers: tuple[str, ...]
    techniques: tuple[str, ...]
    ratios: tuple[float, ...] = ()

    @cached_property
    def dimensions(self) -> dict[str, Dimension]:
        """By name, in the order in which they are drawn."""
        steps, scale = self.base.num_inference_steps, self.base.guidance_scale
        found: dict[str, Dimension] = {
            "steps": Whole(min(2, steps), steps, log=True),
            "solver": Choice((GIVEN, *self.solvers)),
        }
        if self.shift is not None:
            found["shift"] = Real(self.shift / 3, self.shift * 3, log=True)
        if self.bends:
            found["bend"] = Real(0.6, 1.6)
        if scale > 1:
            found["guidance_scale"] = Real(1.0, 2 * scale - 1)
        if "guidance_interval" in self.techniques:
            found |= {"guidance_low": Real(0.0, 0.7), "guidance_high": Real(0.7, 1.0)}
        if "guidance_reuse" in self.techniques:
            found["guidance_every"] = Whole(1, 4)
        if "guidance_rescale" in self.techniques:
            found["guidance_rescale"] = Real(0.0, 1.0)
        if caches := [name for name in CACHES if name in self.techniques]:
            found |= {
                "cache": Choice((NONE, *caches)),
                "threshold": Real(0.01, 1.0, log=True),
                "order": Whole(0, 2),
                "interval": Whole(2, 5),
                "max_skips": Whole(1, 4),
                "warmup": Whole(1, 4),
                "cooldown": Whole(0, 2),
            }
        return found

    def plan(self, genome: Genome) -> SamplerPlan:
        """The plan of a genome. Two genomes may have one plan."""
        scheduler, _, order = str(genome["solver"]).partition("/")
        given = scheduler == GIVEN
        steps = int(genome["steps"])
        plan = replace(
            self.base,
            num_inference_steps=steps,
            scheduler=self.base.scheduler if given else scheduler,
            solver_order=self.base.solver_order if given else int(order) if order else None,
            sigmas=None,
            accelerate=canonical(self._techniques(genome)),
        )
        if "guidance_scale" in genome:
            plan = replace(plan, guidance_scale=_scale(genome))
        if self.shift is not None:
            shift, bend = float(genome["shift"]), float(genome.get("bend", 1.0))
            if abs(bend - 1) >= EVEN:
                return replace(plan, shift=None, sigmas=bent(steps, round(shift, 3), round(bend, 3)))
            if abs(shift / self.shift - 1) > 1e-3:
                return replace(plan, shift=round(shift, 3))
        return plan

    def seeds(self) -> Iterator[dict[str, Any]]:
        """Genomes to begin with: the plan itself, and what a practitioner would try by hand, alone and in pairs."""
        all_steps = self.base.num_inference_steps
        some, few = (max(2, round(all_steps * share)) for share in (0.4, 0.25))
        wanted: list[dict[str, Any]] = [
            {},
            *({"steps": max(2, round(all_steps * share))} for share in (0.6, 0.4, 0.25, 0.15)),
            {"cache": "first_block"},
            {"cache": "gated_taylor"},
            {"cache": "taylorseer", "warmup": 3},
            {"steps": some, "cache": "first_block", "threshold": 0.2},
            {"steps": some, "cache": "magcache"},
            {"steps": some, "guidance_every": 2},
            {"steps": few, "guidance_every": 2},
            {"steps": some, "guidance_low": 0.3},
            {"steps": few, "guidance_high": 0.9},
            {"steps": few, "bend": 0.8},
            {"steps": few, "bend": 1.25},
            {"steps": few, "solver": "dpmpp/2"},
            {"steps": few, "solver": "unipc/3"},
        ]
        unchanged = self._unchanged()
        for changes in wanted:
            if all(self._has(name, value) for name, value in changes.items()):
                yield unchanged | changes

    def _unchanged(self) -> dict[str, Any]:
        """The genome of the base plan."""
        values = {
            "steps": self.base.num_inference_steps,
            "solver": GIVEN,
            "shift": self.shift,
            "bend": 1.0,
            "guidance_scale": self.base.guidance_scale,
            "guidance_low": 0.0,
            "guidance_high": 1.0,
            "guidance_every": 1,
            "guidance_rescale": 0.0,
            "cache": NONE,
            "threshold": 0.1,
            "order": 1,
            "interval": 3,
            "max_skips": 2,
            "warmup": 1,
            "cooldown": 1,
        }
        return {name: values[name] for name in self.dimensions}

    def _has(self, name: str, value: Any) -> bool:
        found = self.dimensions.get(name)
        return found is not None and (not isinstance(found, Choice) or value in found.values)

    def _techniques(self, genome: Genome) -> list[dict[str, Any]]:
        found = [] if (cache := genome.get("cache", NONE)) == NONE else [self._cache(str(cache), genome)]
        if _scale(genome) <= 1:
            return found
        low, high = (round(float(genome.get(f"guidance_{name}", edge)), 2) for name, edge in (("low", 0), ("high", 1)))
        if low >= EVEN or high <= 1 - EVEN:
            found.append({TECHNIQUE: "guidance_interval", "low": low, "high": high})
        if (every := int(genome.get("guidance_every", 1))) > 1:
            found.append({TECHNIQUE: "guidance_reuse", "interval": every})
        if (factor := round(float(genome.get("guidance_rescale", 0)), 2)) >= EVEN:
            found.append({TECHNIQUE: "guidance_rescale", "factor": factor})
        return found

    def _cache(self, name: str, genome: Genome) -> dict[str, Any]:
        made: dict[str, Any] = {TECHNIQUE: name, "warmup": int(genome["warmup"]), "cooldown": int(genome["cooldown"])}
        if name == "taylorseer":
            return made | {"interval": int(genome["interval"]), "order": int(genome["order"]), "keep": "last"}
        made["threshold"] = _digits(float(genome["threshold"]), 2)
        if name == "gated_taylor":
            made["order"] = int(genome["order"])
        if name == "magcache":
            made |= {"max_skips": int(genome["max_skips"]), "ratios": list(self.ratios)}
        return made


def space_of(
    follows: Callable[[SamplerPlan], bool], base: SamplerPlan, shift: float | None, ratios: tuple[float, ...]
) -> Space:
    """What of the space a checkpoint and its layout have: `follows` says of a plan whether they can. `shift` is that in force
    where the checkpoint is a flow."""
    base = replace(base, accelerate=())
    even = bent(2, 1.0, 1.0)
    solvers = [name for name in SOLVERS if follows(_solved(base, name))]
    given = replace(base, num_inference_steps=2, shift=None, sigmas=even)
    bends = shift is not None and base.scheduler != "euler_trailing" and follows(given)
    if bends:  # any of the solvers may be given sigmas
        solvers = [name for name in solvers if follows(_solved(given, name))]
    items: dict[str, dict[str, Any]] = {name: {TECHNIQUE: name} for name in (*CACHES, *GUIDANCE)}
    if ratios:
        items["magcache"]["ratios"] = list(ratios)
    else:
        del items["magcache"]
    techniques = [name for name, item in items.items() if follows(replace(base, accelerate=canonical([item])))]
    return Space(base, shift, bends, tuple(solvers), tuple(techniques), ratios)


def follower(check: Callable[[SamplerPlan], None]) -> Callable[[SamplerPlan], bool]:
    """Whether `check` lets a plan pass, which else raises a UserError."""

    def follows(plan: SamplerPlan) -> bool:
        try:
            check(plan)
        except UserError:
            return False
        return True

    return follows


def bent(steps: int, shift: float, bend: float) -> tuple[float, ...]:
    """Noise levels of `steps` steps, descending from 1; see above."""
    places = [1 - (step / steps) ** bend for step in range(steps)]
    return tuple(round(shift * u / (1 + (shift - 1) * u), 4) for u in places)


def _solved(plan: SamplerPlan, solver: str) -> SamplerPlan:
    scheduler, _, order = solver.partition("/")
    return replace(plan, scheduler=scheduler, solver_order=int(order) if order else None)


def _scale(genome: Genome) -> float:
    scale = float(genome.get("guidance_scale", 1.0))
    return 1.0 if scale < 1 + EVEN else round(scale, 2)


def _digits(value: float, count: int) -> float:
    """So many digits that matter."""
    return round(value, count - 1 - floor(log10(value)))
