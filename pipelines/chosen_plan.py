"""`sampler.plan` of a spec, resolved: the spec with the keys of the plan that a run takes."""

from __future__ import annotations

from pydantic import ValidationError

from infra.errors import UserError
from infra.storage import Storage, reaching
from infra.tables import dataset_exists, read_dataset_json
from models.accelerate.registry import check as check_techniques
from models.families import family_of
from models.loading import read_index
from models.parallel.degrees import Degrees
from models.source import content_sha256, resolve
from pipelines.identity import generator_id
from pipelines.plan_file import KEY, Chosen, PlanFile, find_plans, read_kept
from pipelines.sampling import planned, sampler_plan
from pipelines.spec import Spec


def with_chosen_plan(spec: Spec, storage: Storage, replan: bool = False) -> tuple[Spec, Chosen | None]:
    """The spec with the plan's keys in `sampler`, and where they are from; as it is where it names no plan.

    What dataset.json keeps is taken as long as the spec asks for the same; `replan` looks again. Of several plans the
    cheapest is taken that this layout can follow. UserErrors name the key.
    """
    sampler = spec.sampler
    if sampler.plan is None:
        return spec, None
    asked = {"plan": sampler.plan, "budget": None if sampler.budget is None else str(sampler.budget)}
    generator, shape, name = _key(spec)
    if not replan:
        with reaching(storage.root):
            kept = read_kept(read_dataset_json(storage).get("plan")) if dataset_exists(storage) else None
        if kept is not None and kept.asked == asked and kept.plan.generator_id == generator:
            return _taking(spec, kept.plan, "dataset.json"), kept
    found = find_plans(sampler.plan, spec.output.uri, generator, name, shape, sampler.budget)
    why: UserError | None = None
    for file, plan in found:
        taking = _taking(spec, plan, str(file))
        try:
            _check(taking)
        except UserError as error:
            why = why or error
        else:
            return taking, Chosen(asked, str(file), plan)
    raise UserError(f"{KEY}: none of {len(found)} plans can be followed here ({why})")


def key_of(spec: Spec) -> str:
    """The generator id that plans of a spec go by: that of its checkpoint and adapters. UserErrors name the key."""
    return _key(spec)[0]


def _key(spec: Spec) -> tuple[str, tuple[int, int, int], str]:
    """Generator id, media shape and the model's name."""
    for key, count in (("generators", len(spec.generators)), ("buckets", len(spec.buckets))):
        if count != 1:
            raise UserError(
                f"{KEY}: a plan is for one checkpoint and one shape, found {count} {key}; make a dataset of each"
            )
    generator, bucket = spec.generators[0], spec.buckets[0]
    if generator.teacher_steps:
        raise UserError(
            f"{KEY}: not with generators.teacher_steps, whose steps no plan file knows; remove one of the two"
        )
    if spec.sampler.dualparal is not None:
        raise UserError(f"{KEY}: not with sampler.dualparal, whose blocks no plan file knows; remove one of the two")
    sha256 = content_sha256(resolve(generator.model, "generator", generator.revision))
    adapters = [(content_sha256(resolve(each.uri, "adapter")), each.weight) for each in generator.adapters]
    return generator_id(sha256, adapters), (bucket.height, bucket.width, bucket.num_frames), generator.model


def _taking(spec: Spec, plan: PlanFile, file: str) -> Spec:
    try:
        sampler = planned(spec.sampler, plan.sampler)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{KEY}: {file}: its sampler is none ({said}); make it anew with `ditmill tune`") from error
    return spec.model_copy(update={"sampler": sampler})


def _check(spec: Spec) -> None:
    generator = spec.generators[0]
    pipeline = read_index(resolve(generator.model, "generator", generator.revision))["_class_name"]
    check_techniques(
        sampler_plan(spec.sampler),
        family_of(pipeline) if generator.remote_code is None else None,
        Degrees(**spec.layout.parallel.model_dump()),
        compiled=spec.layout.compile,
        offloaded=spec.layout.offload != "none",
    )
