"""The flow: a few long tasks (expand, generate, verify, publish), never a task for each row.

Ray Data does the work inside `generate`; Prefect says when it runs, retries it when the world is at fault, and keeps its
progress, its table and its links as artifacts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefect import flow, task
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE

from infra.errors import UserError
from infra.telemetry import log
from pipelines.dedup import RecordReport
from pipelines.enumeration import Enumeration
from pipelines.generate import Outcome, Progress, StopRequest
from pipelines.resolve import Resolved
from pipelines.run import Cluster, clean_up, expand, expand_groups, make_samples, open_dataset, sample_groups
from pipelines.verify import Finding, verify


@dataclass
class Context:
    """What the tasks of one run share. It stays in this process: Prefect neither stores nor hashes it."""

    run: Resolved
    cluster: Callable[[], Cluster]
    stop: StopRequest
    report: Callable[[Progress], None]
    retry_failed: bool = False
    enumeration: Enumeration | None = None
    records: RecordReport = field(default_factory=RecordReport)
    outcome: Outcome | None = None
    findings: list[Finding] = field(default_factory=list)
    published: Any = None


def _is_worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """The user's mistakes stay mistakes."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


@task(cache_policy=NO_CACHE, persist_result=False)
def expand_prompts(context: Context) -> None:
    """Prompts, committed."""
    run = context.run
    open_dataset(run)
    context.enumeration, context.records = expand(run, lambda: expand_groups(run, context.cluster()))


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[2, 20],
    retry_condition_fn=_is_worth_retrying,
)
def generate_samples(context: Context) -> None:
    """Samples, committed while they are made. A retry resumes from the tables, under a run id of its own."""
    assert context.enumeration is not None
    artifact = create_progress_artifact(0.0, description=f"samples of {context.run.spec.name}")
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        context.report(progress)
        if time.monotonic() - last > 10 and progress.total:
            last = time.monotonic()
            share = 100.0 * min(1.0, (progress.before_done + progress.done) / progress.total)
            update_progress_artifact(artifact, share)

    run = context.run
    context.outcome = make_samples(
        run,
        context.enumeration,
        partial(_sample_groups, context),
        context.stop,
        show,
        retry_failed=context.retry_failed,
    )
    update_progress_artifact(artifact, 100.0)


def _sample_groups(context: Context) -> Any:
    return sample_groups(context.run, context.cluster())


@task(cache_policy=NO_CACHE, persist_result=False)
def verify_dataset(context: Context) -> None:
    """What is promised, checked on the stored bytes of this run."""
    removed = clean_up(context.run)
    if removed:
        log().info("swept", files=len(removed))
    context.findings = list(verify(context.run.storage, run_id=context.run.run_id))


@task(cache_policy=NO_CACHE, persist_result=False)
def publish(context: Context) -> None:
    """Card, report and artifacts."""
    from pipelines.card import write_card
    from pipelines.report import build_report

    run, outcome = context.run, context.outcome
    write_card(run.storage)
    context.published = build_report(run.storage)
    assert outcome is not None
    counts = outcome.progress
    create_table_artifact(
        [
            {"what": "accepted", "samples": counts.accepted},
            {"what": "rejected", "samples": counts.rejected},
            {"what": "failed", "samples": counts.failed},
        ],
        description=f"run {run.run_id} of {run.spec.name}: {outcome.status}",
    )
    if run.storage.is_local:
        create_link_artifact(f"file://{run.storage.path('report/index.html')}", description="gallery and funnel")


@flow(name="synthesize", validate_parameters=False)
def synthesize(context: Context) -> Context:
    """Prompts to a committed, filtered, captioned dataset."""
    expand_prompts(context)
    generate_samples(context)
    verify_dataset(context)
    publish(context)
    return context
