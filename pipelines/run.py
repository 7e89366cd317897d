"""One invocation on a dataset: what it says of itself in `dataset.json` and `runs`, and its steps in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any

from infra.control import Pulse, beating, sweep, sweep_stale
from infra.errors import UserError
from infra.ray_session import Cluster
from infra.schema import SCHEMA_VERSION
from infra.secrets import redact
from infra.storage import reaching, writing
from infra.tables import dataset_exists, read_dataset_json
from infra.telemetry import bound, log
from pipelines.commits import Retry
from pipelines.dedup import RecordReport
from pipelines.early import early_gate
from pipelines.enumeration import Enumeration
from pipelines.generate import Job, Outcome, Progress, StopRequest, generate
from pipelines.indexing import indexing_of
from pipelines.placement import Group, place, place_stored
from pipelines.prompts import commit_prompts
from pipelines.recipes import RECIPES
from pipelines.resolve import Resolved, code_version
from pipelines.run_rows import commit_run_row
from pipelines.unknown_words import warn_of_unknown_words


def open_dataset(run: Resolved) -> None:
    """Write `dataset.json`, or check that the dataset there is of this recipe and keeps the same tensors.

    Of what is there, only the plan that `sampler.plan` was resolved to is replaced, where it was resolved anew.
    """
    spec = run.spec
    wanted = {
        "name": spec.name,
        "schema_version": SCHEMA_VERSION,
        "recipe": spec.recipe,
        "tensors": dict(spec.output.tensors),
        **({"trajectory": _kept(run)} if spec.trajectory else {}),
        "plan": run.chosen and run.chosen.as_dict(),
        "ditmill": code_version(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with reaching(redact(run.storage.root)), writing(redact(run.storage.root)):
        if run.storage.create_bytes("dataset.json", json.dumps(wanted, indent=2).encode()):
            return
    check_dataset(run)
    if run.chosen is not None and not run.chosen.kept:
        found = read_dataset_json(run.storage) | {"plan": run.chosen.as_dict()}
        with writing(redact(run.storage.root)):
            run.storage.write_bytes("dataset.json", json.dumps(found, indent=2).encode())


def check_dataset(run: Resolved) -> None:
    """UserError if the dataset that is there is of another recipe or keeps other tensors or states."""
    if not dataset_exists(run.storage):
        return
    found = read_dataset_json(run.storage)
    held = {
        "recipe": ("recipe", run.spec.recipe),
        "output.tensors": ("tensors", dict(run.spec.output.tensors)),
        "trajectory": ("trajectory", _kept(run)),
    }
    for name, (key, asked) in held.items():
        if found.get(key) != asked:
            raise UserError(
                f"{name}: the dataset at {redact(run.storage.root)} was made with {found.get(key)!r}, found {asked!r};"
                " what a dataset holds is fixed, so set output.uri to a new one, or change it back"
            )
    if found["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"output.uri: the dataset has schema version {found['schema_version']}, this ditmill knows {SCHEMA_VERSION};"
            " use a newer ditmill"
        )


def _kept(run: Resolved) -> dict[str, Any] | None:
    """What `dataset.json` says of the states of paths: which are kept, of how many steps, and as what."""
    states = run.kept_states
    if states is None:
        return None
    return {"places": list(states.places), "steps": run.plan.num_inference_steps, "dtype": states.dtype}


def expand(run: Resolved, groups: Callable[[], tuple[Group, ...]]) -> tuple[Enumeration, RecordReport]:
    """Commit the run's prompts; the enumeration of its samples."""
    report = RecordReport()
    with bound(run_id=run.run_id), beating(Pulse(run.storage, run.run_id), "prompts", dict):
        plan_file = commit_prompts(run, groups, report)
        warn_of_unknown_words(run, plan_file)
        log().info("prompts", **{key: value for key, value in report.as_dict().items() if key != "examples"})
    return (
        Enumeration(
            storage=run.storage,
            plan_file=plan_file,
            samples_per_prompt=run.spec.samples_per_prompt,
            generator_ids=run.generator_ids,
            plan_id=run.plan_id,
        ),
        report,
    )


def make_samples(
    run: Resolved,
    enumeration: Enumeration,
    groups: Callable[[], tuple[Group, ...]],
    stop: StopRequest,
    report: Callable[[Progress], None],
    retry: Collection[Retry] = (),
) -> Outcome:
    """Generate what the dataset lacks; the run's start and end are rows of `runs`."""
    # What `verify` needs to enumerate again, beside the spec.
    ids = {"generator_ids": run.generator_ids, "plan_id": run.plan_id}
    known = {"plan_file": enumeration.plan_file, "planned": len(enumeration), "extra_json": json.dumps(ids)}
    early = early_gate(run)
    commit_run_row(run, "started", status="running", **known)
    job = Job(
        storage=run.storage,
        run_id=run.run_id,
        enumeration=enumeration,
        batch_size=run.spec.layout.batch_size,
        seed=run.spec.seed,
        target=run.spec.target,
        budget=run.spec.budget,
        commit_every=run.spec.output.commit_every,
        retry=retry,
        hand_out=iter if early is None else early.bounded,
        guards=run.spec.guards,
        rows=run.spec.schedule.rows(run.storage),
        name=run.spec.name,
        with_texts="text_embeddings" in run.spec.output.tensors,
    )
    try:
        with bound(run_id=run.run_id):
            outcome = generate(job, groups, stop, report)
    except BaseException as error:
        failed = known | {"extra_json": json.dumps({**ids, "error": str(error)[:2000]})}
        try:
            commit_run_row(run, "ended", status="failed", **failed)
        except Exception as second:  # the storage may be what failed
            said = f"{type(second).__name__}: {second}"
            log().warning("could not record how the run ended", run_id=run.run_id, error=said)
        raise
    progress = outcome.progress
    told = {"actors": outcome.actors, "why": outcome.why, "taken_out": outcome.taken_out}
    if early is not None:
        told["early"] = early.as_told()
    commit_run_row(
        run,
        "ended",
        status=outcome.status,
        **known | {"extra_json": json.dumps(ids | told)},
        planned_through=outcome.planned_through,
        accepted=progress.accepted,
        rejected=progress.rejected,
        failed=progress.failed,
        allocated_accelerator_seconds=outcome.allocated,
        overhead_json=json.dumps({name: round(seconds, 4) for name, seconds in outcome.overhead.items()}),
        reproducible=outcome.reproducible,
    )
    return outcome


def clean_up(run: Resolved) -> list[str]:
    """Remove what this run, and runs that died, wrote and never committed."""
    removed = sweep(run.storage, run.run_id)
    for swept in sweep_stale(run.storage, but=run.run_id).values():
        removed += swept
    Pulse(run.storage, run.run_id).end()
    return removed


def sample_groups(run: Resolved, cluster: Cluster) -> tuple[Group, ...]:
    """Where the stages of generating run; of curating, where clips are looked at."""
    recipe = RECIPES[run.spec.recipe]
    if run.spec.recipe == "curate":
        (look,) = recipe.generating(run)
        return place_stored(look, recipe.judging(run), cluster.free(), run.spec.compute, spare=0)
    return place(
        recipe.generating(run),
        recipe.judging(run),
        cluster.free(),
        run.spec.compute,
        needs_model=run.needs_model,
    )


def expand_groups(run: Resolved, cluster: Cluster) -> tuple[Group, ...]:
    """Where prompts are expanded, or sources indexed."""
    if run.spec.recipe == "curate":
        free, asked = cluster.free(), run.spec.compute.asked("index")
        count = run.spec.compute.least("index") or max(1, int(free.cpus))
        cpus = asked.cpus or min(1.0, max(0.1, (free.cpus - 0.1) / count))
        return (Group("index", (indexing_of(run),), count, cpus, 0.0),)
    assert run.expander is not None
    gpus = 1.0 if cluster.gpus >= 1 else 0.0
    return (Group("expand", (run.expander.stage,), 1, 0.5, gpus, on_gpu_cluster=bool(gpus)),)
