"""The flow: a few long tasks (expand, generate, verify, publish), never a task for each row.

Ray Data does the work inside `generate`; Prefect says when it runs, retries it when the world is at fault, and keeps its
progress, its table and its links as artifacts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import progress_artifact, publish_summary
from flows.console import Console, current_console
from flows.notify import Paused, crashed, telling
from flows.stopping import stopping
from flows.tick import end_preempted, in_deployment, this_tick
from infra.errors import UserError
from infra.ray_session import Cluster, ray_session
from infra.storage import writing
from infra.telemetry import log
from pipelines.commits import Retry, retried
from pipelines.dedup import RecordReport
from pipelines.enumeration import Enumeration
from pipelines.generate import Outcome, Progress, StopRequest
from pipelines.graph import worker_env
from pipelines.placement import Group
from pipelines.report import ReportSummary
from pipelines.resolve import Resolved, new_run_id, resolve_spec
from pipelines.run import clean_up, expand, expand_groups, make_samples, open_dataset, sample_groups
from pipelines.spec import Spec
from pipelines.thresholds import find_thresholds
from pipelines.verify import Finding, verify


class Run:
    """What the tasks of one flow run share. It stays in this process: no dataclass, which Prefect would take apart."""

    def __init__(
        self, resolved: Resolved, console: Console, resources: contextlib.ExitStack, retry: tuple[Retry, ...]
    ) -> None:
        self.resolved = resolved
        self.console = console
        self.retry = retry
        self.stop: StopRequest = console.stop
        self.enumeration: Enumeration | None = None
        self.records = RecordReport()
        self.outcome: Outcome | None = None
        self.findings: list[Finding] = []
        self.published: ReportSummary | None = None
        self._resources = resources
        self._abandoned: list[Resolved] = []

    @cached_property
    def cluster(self) -> Cluster:
        """The Ray cluster, connected to when it is first needed."""
        spec = self.resolved.spec
        env = worker_env(spec.layout.threads)
        return self._resources.enter_context(
            ray_session(spec.compute.ray_address, env, spec.compute.limits)  # type: ignore[arg-type]
        )

    def expand_groups(self) -> tuple[Group, ...]:
        return expand_groups(self.resolved, self.cluster)

    def sample_groups(self) -> tuple[Group, ...]:
        return sample_groups(self.resolved, self.cluster)

    def abandon(self) -> None:
        """After a failure: end the Ray session, in which workers may still write, and be ready for another attempt."""
        import ray

        self.__dict__.pop("cluster", None)
        ray.shutdown()
        self.clean_up()
        self._abandoned.append(self.resolved)
        self.resolved = self.resolved.again()

    def clean_up(self) -> None:
        """Remove what this run's attempts, and runs that died, wrote and never committed."""
        try:
            removed = [name for attempt in (*self._abandoned, self.resolved) for name in clean_up(attempt)]
        except Exception as error:  # storage that is down or full; the next run sweeps
            log().warning("could not sweep", run_id=self.resolved.run_id, error=f"{type(error).__name__}: {error}")
        else:
            log().info("swept", run_id=self.resolved.run_id, files=len(removed))


def _is_worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """The user's mistakes stay mistakes."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


@task(cache_policy=NO_CACHE, persist_result=False)
def expand_prompts(run: Run) -> None:
    """Prompts, committed."""
    open_dataset(run.resolved)
    try:
        with writing(run.resolved.storage.root):
            run.enumeration, run.records = expand(run.resolved, run.expand_groups)
    except Exception:
        run.abandon()
        raise
    run.console.records(run.records)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[2, 20],
    retry_condition_fn=_is_worth_retrying,
)
def generate_samples(run: Run) -> None:
    """Samples, committed while they are made. A retry resumes from the tables, as a run with an id of its own."""
    with progress_artifact(f"samples of {run.resolved.spec.name}") as share:
        while run.outcome is None:
            made = Progress()

            def show(progress: Progress) -> None:
                nonlocal made
                made = progress
                run.console.progress(progress)
                share((progress.before_done + progress.done) / max(1, progress.total))

            try:
                run.outcome = _attempt(run, show)
            except Exception as error:
                failed = run.resolved.run_id
                run.abandon()
                if isinstance(error, UserError) or not made.committed:
                    raise
                # Only what fails without progress uses up Prefect's retries: a run of days meets more faults than that.
                said = f"{type(error).__name__}: {error}"
                log().warning("the run failed and goes on", run_id=failed, error=said)


def _attempt(run: Run, show: Callable[[Progress], None]) -> Outcome:
    assert run.enumeration is not None
    with writing(run.resolved.storage.root):
        return make_samples(run.resolved, run.enumeration, run.sample_groups, run.stop, show, retry=run.retry)


@task(cache_policy=NO_CACHE, persist_result=False)
def verify_dataset(run: Run) -> None:
    """What is promised, checked on the stored bytes of this run."""
    run.clean_up()
    run.findings = list(verify(run.resolved.storage, run_id=run.resolved.run_id))
    run.console.verified(run.findings)


@task(cache_policy=NO_CACHE, persist_result=False)
def publish(run: Run) -> None:
    """Card, report and artifacts."""
    from pipelines.card import write_card
    from pipelines.report import build_report

    storage, outcome = run.resolved.storage, run.outcome
    assert outcome is not None
    with writing(storage.root):
        write_card(storage)
        run.published = build_report(storage)
    counts = {
        "accepted": outcome.progress.accepted,
        "rejected": outcome.progress.rejected,
        "failed": outcome.progress.failed,
    }
    publish_summary(
        counts,
        description=f"run {run.resolved.run_id} of {run.resolved.spec.name}: {outcome.status}",
        report=f"file://{storage.path('report/index.html')}" if storage.is_local else None,
    )
    run.console.finished(run.resolved, outcome, run.published, run.findings)


@flow(name="synthesize", validate_parameters=False, on_crashed=[crashed])
def synthesize(spec: dict[str, Any], retry_failed: bool = False, retry_early: bool = False) -> dict[str, Any]:
    """Prompts to a committed, filtered, captioned dataset.

    Args:
        spec: a spec as plain values (see pipelines.spec.Spec).
        retry_failed: also try samples again that failed before.
        retry_early: also finish samples that were stopped early.

    Returns:
        run_id, status, counts and what `verify` found.

    Raises:
        Paused: the run's guards ended it; what it made is committed and published.
    """
    asked, console = Spec.model_validate(spec), current_console()
    with contextlib.ExitStack() as resources, stopping(console), telling(asked) as facts:
        found = find_thresholds(resolve_spec(this_tick(asked), new_run_id()))
        run = Run(found, console, resources, retried(retry_failed, retry_early))
        facts |= {"run_id": run.resolved.run_id, "tick": run.resolved.spec.schedule.tick}
        expand_prompts(run)
        generate_samples(run)
        verify_dataset(run)
        publish(run)
        outcome = run.outcome
        assert outcome is not None
        facts |= {
            "run_id": run.resolved.run_id,
            "status": outcome.status,
            "accepted": outcome.progress.accepted,
            "rejected": outcome.progress.rejected,
            "failed": outcome.progress.failed,
            "findings": [str(finding) for finding in run.findings],
        }
        if outcome.status == "paused":
            raise Paused(outcome.why)
    if in_deployment() and outcome.why == "SIGTERM":
        end_preempted()
    return facts
