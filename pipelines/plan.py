"""`ditmill plan`: what would run, what it would cost, and what differs from what the dataset holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from infra.ray_session import Cluster
from infra.storage import reaching
from models.generator import load_generator
from models.licences import Licence
from models.source import is_here
from pipelines import calibrate as calibration
from pipelines.calibrate import Calibration, Look
from pipelines.dedup import RecordReport
from pipelines.differences import Difference, difference
from pipelines.placement import Group
from pipelines.plan_file import Chosen
from pipelines.records import unique_records
from pipelines.resolve import Resolved, resolve_spec
from pipelines.run import check_dataset, sample_groups
from pipelines.sampling import sampler_plan
from pipelines.sizes import in_words, known_shape, planned_bytes
from pipelines.spec import Bucket, Spec, absolute_paths
from pipelines.teacher import named_teacher
from pipelines.thresholds import find_thresholds, told
from pipelines.unknown_words import CHUNK, unknown_lines

START_SECONDS = 20.0
"""Ray and Prefect, beside loading models, on a small machine."""


@dataclass(frozen=True)
class Estimate:
    """What the new samples would cost on this machine. `seconds` is wall time, start-up and loading included."""

    seconds: float
    accelerator_seconds: float
    nbytes: float
    nfe: int
    nfe_each: int
    stage_seconds: dict[str, float]
    look: Look | None = None


@dataclass(frozen=True)
class PlanReport:
    """A plan. `resolved` parts are None where models are not on this machine: `missing` names those."""

    spec: Spec
    records: RecordReport
    planned: int
    difference: Difference | None
    groups: tuple[Group, ...]
    licences: dict[str, Licence]
    missing: tuple[str, ...]
    estimate: Estimate | None
    warnings: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()
    """Of those that are found from data, what was found."""
    nbytes: Mapping[str, float] = field(default_factory=dict)
    """Of the new samples by kind, if all are accepted; empty where it is not known."""
    chosen: Chosen | None = None
    """What `sampler.plan` was resolved to."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "spec": self.spec.model_dump(mode="json"),
            "prompts": self.records.as_dict(),
            "planned": self.planned,
            "new": self.difference.new if self.difference else self.planned,
            "difference": None if self.difference is None else asdict(self.difference),
            "groups": [
                {
                    "name": group.name,
                    "stages": [stage.name for stage in group.stages],
                    "actors": group.actors,
                    "most_actors": group.most_actors,
                    "num_cpus": group.num_cpus,
                    "num_gpus": group.num_gpus,
                    "accelerator_type": group.accelerator_type,
                    "ranks": group.ranks,
                }
                for group in self.groups
            ],
            "licences": {model: asdict(licence) for model, licence in self.licences.items()},
            "missing_models": list(self.missing),
            "warnings": list(self.warnings),
            "thresholds": list(self.thresholds),
            "chosen_plan": self.chosen and self.chosen.as_dict(),
            "bytes": dict(self.nbytes),
            "estimate": None if self.estimate is None else asdict(self.estimate),
        }


def make_plan(spec: Spec, calibrate: bool = True, replan: bool = False) -> PlanReport:
    """Plan a spec. Reads prompts, tables and models that are here; fetches nothing and writes nothing to the dataset.

    `replan` as `pipelines.resolve.resolve_spec` has it.
    """
    spec = absolute_paths(spec)
    records = RecordReport()
    missing = tuple(model for model, revision in _models(spec) if not is_here(model, revision))
    if missing:
        count = 0 if spec.recipe == "curate" else sum(1 for _ in unique_records(spec, records))
        expand = spec.prompts.expand
        variants = (expand.variants + expand.keep_original) if expand else 1
        planned = count * variants * spec.samples_per_prompt * len(spec.generators)
        if spec.target.samples is not None:
            planned = min(planned, spec.target.samples)
        sampler_plan(spec.sampler)
        nbytes = planned_bytes(spec, planned, partial(known_shape, spec)) if planned else {}
        return PlanReport(spec, records, planned, None, (), _stated(spec, missing), missing, None, nbytes=nbytes)
    run = resolve_spec(spec, replan=replan)
    with reaching(run.storage.root):
        check_dataset(run)
        run = find_thresholds(run)
        found = difference(run, records)
    groups = sample_groups(run, local_cluster(spec))
    estimate, nbytes = None, {}
    if calibrate and found.new and spec.recipe != "curate" and (measured := calibration.calibrate(run)) is not None:
        estimate = _estimate(found.new, run.spec.layout.batch_size, groups, measured)
        nbytes = planned_bytes(run.spec, found.new, partial(_shape, run), measured.kinds)
    warnings = tuple(unknown_lines(run, _first_prompts(spec)))
    said = tuple(told(run))
    return PlanReport(
        run.spec,
        records,
        found.planned,
        found,
        groups,
        dict(run.licences),
        (),
        estimate,
        warnings,
        said,
        nbytes,
        run.chosen,
    )


def _shape(run: Resolved, bucket: Bucket) -> tuple[int, ...] | None:
    """Of the first generator's latents, which is loaded; None where it is not known."""
    generator = load_generator(run.generators[0])
    if generator.family is None or run.spec.recipe == "prompts":
        return None
    return generator.latent_shape(bucket.height, bucket.width, bucket.num_frames)


def _first_prompts(spec: Spec) -> Iterator[pa.Array]:
    """Some of the prompts that will be sampled; none where a language model has yet to write them."""
    if spec.recipe != "curate" and (spec.prompts.expand is None or spec.prompts.expand.keep_original):
        first = islice(unique_records(spec), CHUNK)
        yield pa.array([record.prompt for record in first], pa.string())


def local_cluster(spec: Spec) -> Cluster:
    """What a cluster started on this machine would have, within the spec's limits."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    limits = spec.compute.limits
    return Cluster(
        min(float(os.cpu_count() or 1), limits.get("cpus", float("inf"))),
        min(float(gpus), limits.get("gpus", float("inf"))),
    )


def render(plan: PlanReport, name: str) -> str:
    """The plan for a person."""
    spec = plan.spec
    lines = [f"{name}: recipe {spec.recipe} into {spec.output.uri}", f"  prompts: {plan.records.summary()}"]
    for example in plan.records.examples:
        lines.append(f"    {example.kind}: {example.prompt!r} ~ {example.like!r}")
    if plan.difference is None:
        lines.append(f"  {plan.planned} samples planned")
    else:
        lines += [f"  {line}" for line in plan.difference.lines(spec.output.uri)]
    for group in plan.groups:
        stages = " > ".join(stage.name for stage in group.stages)
        gpus = f", {group.num_gpus:g} GPU" if group.num_gpus else ""
        each = f"{group.ranks} ranks of " if group.ranks > 1 else ""
        kind = f" ({group.accelerator_type})" if group.accelerator_type else ""
        count = (
            f"{group.actors} actor(s)"
            if group.most_actors == group.actors
            else f"{group.actors} to {group.most} actors"
        )
        lines.append(f"  {group.name}: {stages}: {count} of {each}{group.num_cpus:.2g} CPU{gpus}{kind}")
    if plan.estimate is not None:
        found = plan.estimate
        lines.append(
            f"  estimated here: {_duration(found.seconds)}, {found.accelerator_seconds:.0f} accelerator-seconds,"
            f" {found.nbytes / 1e6:.1f} MB, {found.nfe} function evaluations ({found.nfe_each} a sample)"
        )
        each = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in found.stage_seconds.items())
        lines.append(f"    seconds a sample: {each}")
        if found.look is not None:
            lines.append(f"    {found.look}")
    if plan.nbytes:
        lines.append(f"  {in_words(plan.nbytes)}")
    for model, licence in plan.licences.items():
        lines.append(
            f"  licence of {model}: {licence.name}; may outputs train others? {licence.may_train} ({licence.why})"
        )
    if plan.chosen is not None:
        lines.append(f"  {plan.chosen}")
    lines += [f"  {line}" for line in plan.thresholds]
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    if plan.missing:
        lines.append(f"  not on this machine, so no estimate: {', '.join(plan.missing)}; `ditmill run` fetches them")
    lines.append("  resolved spec:")
    lines += [
        f"    {line}" for line in yaml.safe_dump(_set_keys(spec), sort_keys=False, allow_unicode=True).splitlines()
    ]
    return "\n".join(lines)


def _set_keys(spec: Spec) -> dict[str, Any]:
    """The spec without keys that hold nothing."""
    return {key: value for key, value in spec.model_dump(mode="json").items() if value not in ({}, [], None)}


def _models(spec: Spec) -> dict[tuple[str, str | None], None]:
    """(model, revision) of all models that a spec names."""
    named: list[tuple[str, str | None]] = [(generator.model, generator.revision) for generator in spec.generators]
    named += [(adapter.uri, None) for generator in spec.generators for adapter in generator.adapters]
    named += [(name, None) for generator in spec.generators if (name := named_teacher(generator)) is not None]
    for section in (spec.judge, spec.judge.screen, spec.caption):
        if section is not None and section.backend == "transformers":
            named.append((section.model, section.revision))
    if (decompose := spec.judge.decompose) is not None and decompose.model is not None:
        named.append((decompose.model, decompose.revision))
    if spec.prompts.expand is not None:
        named.append((spec.prompts.expand.model, spec.prompts.expand.revision))
    return dict.fromkeys(named)


def _stated(spec: Spec, missing: tuple[str, ...]) -> dict[str, Licence]:
    """Licences as the spec states them, for models that are not here."""
    stated = {model: Licence("unknown", "unknown", "it is not on this machine yet") for model in missing}
    for generator in spec.generators:
        if generator.licence or generator.may_train:
            stated[generator.model] = Licence(
                generator.licence or "unknown",
                generator.may_train or "unknown",
                "the spec says so (generators.may_train)",
            )
    return stated


def _estimate(new: int, batch_size: int, groups: tuple[Group, ...], measured: Calibration) -> Estimate:
    batches = -(-new // batch_size)
    busiest = max(
        sum(measured.stage_seconds.get(stage.name, 0.0) for stage in group.stages) * batches / group.actors
        for group in groups
    )
    per_sample = {stage: seconds / measured.samples for stage, seconds in measured.stage_seconds.items()}
    seconds = START_SECONDS + measured.load_seconds + busiest
    # Every actor is held for the whole run, busy or not.
    held = sum(group.actors * group.accelerators for group in groups) * (measured.load_seconds + busiest)
    return Estimate(seconds, held, measured.nbytes * new, measured.nfe * new, measured.nfe, per_sample, measured.look)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
