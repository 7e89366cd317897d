"""A Prefect deployment of the flow: scheduled, one tick at a time, and watched (see flows.tick for what a tick does)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from infra.errors import UserError
from pipelines.spec import Spec

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.deployments.runner import RunnerDeployment

HEARTBEAT_SECONDS = 30
SILENT = timedelta(seconds=4 * HEARTBEAT_SECONDS)
ANCHOR = datetime(2024, 1, 1, tzinfo=UTC)
"""`every: 6h` ticks at 0, 6, 12 and 18 o'clock, whenever it was deployed."""


@dataclass(frozen=True)
class Deployed:
    """What was made, and what its user does next."""

    name: str
    deployment_id: str
    next: str

    def __str__(self) -> str:
        return f"{self.name}: deployed\n  next      {self.next}"


def deploy(spec: Spec, work_pool: str, image: str | None = None) -> Deployed:
    """Make or replace the deployment of `spec` for the workers of a pool. UserError where there is no server or pool."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.notify import check_told

    check_told(spec)
    _check_server()
    with get_client(sync_client=True) as client:
        try:
            pool = client.read_work_pool(work_pool)
        except ObjectNotFound:
            raise UserError(
                f"--work-pool: there is no pool {work_pool}; make it with `prefect work-pool create {work_pool}"
                " --type process`, or use --serve, which needs none"
            ) from None
    if (pool.type == "process") == (image is not None):
        said = "takes no image" if image else "wants the image that holds ditmill: give --image"
        raise UserError(f"--work-pool: {work_pool} is of type {pool.type}, which {said}")
    deployment = _deployment(spec, work_pool)
    deployment_id: UUID = deployment.apply(work_pool_name=work_pool, image=image)  # type: ignore[assignment]
    _watch(spec, deployment_id)
    return Deployed(_name(spec), str(deployment_id), f"prefect worker start --pool {work_pool}")


def serve(spec: Spec) -> None:
    """Make the deployment and run its ticks here, each in a process of its own, until interrupted."""
    from prefect.runner import Runner

    from flows.notify import check_told

    check_told(spec)
    _check_server()

    deployment = _deployment(spec)  # here, where Prefect has no loop running and makes it at once

    async def run() -> None:
        runner = Runner(name=spec.name, limit=1, pause_on_shutdown=False, heartbeat_seconds=HEARTBEAT_SECONDS)
        deployment_id = await runner.aadd_deployment(deployment)
        await asyncio.to_thread(_watch, spec, deployment_id)
        await runner.start()

    os.environ.update(_environment())
    asyncio.run(run())


def _deployment(spec: Spec, work_pool: str | None = None) -> RunnerDeployment:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.flows import EntrypointType
    from prefect.schedules import Cron, Interval

    from flows.synthesize import synthesize

    schedule = spec.schedule
    try:
        ticks = []
        if schedule.interval is not None:
            ticks.append(Interval(schedule.interval, anchor_date=ANCHOR, timezone=schedule.timezone))
        if schedule.cron is not None:
            ticks.append(Cron(schedule.cron, timezone=schedule.timezone))
        return synthesize.to_deployment(  # type: ignore[return-value]
            spec.name,
            schedules=ticks,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            parameters={"spec": json.loads(spec.model_dump_json())},
            description=f"ditmill: the dataset {spec.name}",
            enforce_parameter_schema=False,
            entrypoint_type=EntrypointType.MODULE_PATH,
            work_pool_name=work_pool,
            job_variables={"env": _environment()} if work_pool else None,
        )
    except ValueError as error:
        raise UserError(
            f"schedule.cron: {schedule.cron!r} is none that can tick ({error}); such as 0 3 * * *"
        ) from error


def _environment() -> dict[str, str]:
    """Of a flow run's process. What workers on other machines need of their own, they bring."""
    return {"MKL_CBWR": "AUTO,STRICT", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}


def _watch(spec: Spec, deployment_id: UUID) -> None:
    """Have the server take a flow run for crashed that it does not hear of any more: its machine is gone.

    Of a run that a schedule made, Prefect 3.8 holds every change of state back from automations for 15 minutes (each event
    waits for the one before it, and the first is never sent). Heartbeats wait for nothing, and what has ended cannot crash.
    So this is the one thing that is left to an automation.
    """
    from prefect.automations import Automation
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture

    name = f"ditmill {spec.name}: silent ticks have crashed"
    with contextlib.suppress(ValueError):  # there is none yet
        Automation.read(name=name).delete()
    heartbeat = {"prefect.flow-run.heartbeat"}
    Automation(
        name=name,
        trigger=EventTrigger(
            after=heartbeat,
            expect=heartbeat,
            match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
            match_related={  # type: ignore[arg-type]
                "prefect.resource.id": f"prefect.deployment.{deployment_id}",
                "prefect.resource.role": "deployment",
            },
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENT,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"not heard of for {SILENT.seconds} s")],
    ).create()


def _check_server() -> None:
    """A schedule needs a server that stays; the temporary one of `ditmill run` ends with its run."""
    import httpx
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise UserError(
            "PREFECT_API_URL: not set, and a schedule needs a Prefect server that stays; start one with"
            " `prefect server start` and set it to http://127.0.0.1:4200/api"
        )
    try:
        httpx.get(f"{url}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        if not (isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403)):
            raise UserError(
                f"PREFECT_API_URL: {url} does not answer ({type(error).__name__}); start the server"
            ) from None


def _name(spec: Spec) -> str:
    return f"synthesize/{spec.name}"
