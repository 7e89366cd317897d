"""One tick of a deployment: what Prefect knows of it, and how it goes on after its process or its machine is gone.

A tick whose process was killed is scheduled again by its worker, under the same nominal time, and goes on from the tables.
One whose machine is gone Prefect takes for crashed in the end (see flows.deploy), and the next tick to start schedules it
again. Outside of a deployment all of this does nothing.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import AwaitingRetry

from infra.telemetry import configure, log
from pipelines.schedule import Schedule
from pipelines.spec import Spec

MOST_ATTEMPTS = 10
"""Of one tick, so that one that always crashes does not do so for ever."""
OLDEST = timedelta(days=7)
"""A tick that crashed longer ago is left as it is."""


def in_deployment() -> bool:
    return runtime.deployment.id is not None


def this_tick(spec: Spec) -> Spec:
    """The spec of this flow run: with `epoch: scheduled_time`, of the tick for which Prefect scheduled it.

    That time stays the same however late the run starts and however often it is tried.
    """
    if not in_deployment():
        return spec
    configure()
    go_on_with_crashed()
    if runtime.flow_run.run_count > MOST_ATTEMPTS:
        raise RuntimeError(f"this tick crashed {MOST_ATTEMPTS} times; see its logs, then run the deployment by hand")
    schedule = spec.schedule
    if schedule.epoch != "scheduled_time" or schedule.tick is not None:
        return spec
    nominal = runtime.flow_run.scheduled_start_time.astimezone(UTC).isoformat()
    log().info("tick", scheduled_time=nominal, attempt=runtime.flow_run.run_count)
    return spec.model_copy(update={"schedule": Schedule.model_validate({**schedule.model_dump(), "tick": nominal})})


def may_go_on(flow_run: FlowRun) -> bool:
    """Whether a crashed flow run has attempts left."""
    return flow_run.run_count < MOST_ATTEMPTS and flow_run.deployment_id is not None


def go_on(flow_run_id: UUID) -> None:
    """Schedule a flow run again, if it is still crashed."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_id).state
        if state is not None and state.is_crashed():
            client.set_flow_run_state(flow_run_id, AwaitingRetry(message="it crashed, and goes on from the tables"))


def go_on_with_crashed() -> None:
    """Schedule the crashed ticks of this deployment again: nobody was left to do so when they crashed."""
    crashed = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[UUID(runtime.deployment.id)]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=crashed, limit=50, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
    for flow_run in found:
        due = flow_run.expected_start_time
        if may_go_on(flow_run) and due is not None and datetime.now(UTC) - due < OLDEST:
            go_on(flow_run.id)
            log().warning("a tick that crashed goes on", scheduled_time=str(flow_run.expected_start_time))


def pause_deployment() -> None:
    """No more ticks until somebody resumes the deployment."""
    if in_deployment():
        with get_client(sync_client=True) as client:
            client.pause_deployment(runtime.deployment.id)


def end_preempted() -> None:
    """After SIGTERM, with everything in hand committed: schedule the rest of the tick again, and end this process.

    At once: a flow that ends in a state that is not final is taken for crashed. One that was cancelled stays so.
    """
    flow_run_id = UUID(runtime.flow_run.id)
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_id).state
        if state is not None and (state.is_cancelling() or state.is_cancelled()):
            return
        client.set_flow_run_state(flow_run_id, AwaitingRetry(message="the process was told to end; the rest goes on"))
    log().warning("the process was told to end; the rest of the tick is scheduled again")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
