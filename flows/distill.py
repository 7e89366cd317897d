"""The flow of a student: train it, write its checkpoint, compare it with its teacher."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.console import Console, console, current_console, duration
from infra.prefect_session import prefect_session, wait_until_up
from infra.storage import reaching
from infra.telemetry import configure, values
from models.pack import cache_dir

if TYPE_CHECKING:
    from infra.storage import Storage
    from pipelines.distill import Job
    from pipelines.distill_settings import Distill

JSON_EVERY = 10.0


def run_distill(
    storage: Storage, release: str, settings: Distill, out: Path, minutes: float, as_json: bool
) -> dict[str, Any]:
    """Prefect's server, then the flow; what the command prints. UserErrors come before anything is started. Of 0 minutes no
    rank is started, but others may be."""
    from pipelines.distill_run import prepared

    configure()
    with reaching(storage.root):
        job = prepared(storage, release, settings, out)
    if minutes == 0:
        return {"student": str(out), "status": "prepared", "job": str(out / "job.json")}
    shown = Console(as_json)
    with redirect_stdout(sys.stderr), prefect_session(cache_dir()), console(shown):
        wait_until_up()
        return distill_flow()(asdict(job), str(out), minutes)


def distill_flow() -> Any:
    """The flow itself. Prefect reads its settings when it is imported: this imports it."""
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    from flows.artifacts import progress_artifact
    from flows.stopping import stopping
    from pipelines.distill import Job
    from pipelines.distill_run import publish, train

    def worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
        from infra.errors import UserError

        return not isinstance(state.result(raise_on_failure=False), UserError)

    @task(
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=[2, 20],
        retry_condition_fn=worth_retrying,
    )
    def train_student(job: Job, out: Path, ends: float) -> int:
        """A retry goes on from the newest state."""
        shown = current_console()
        with progress_artifact(f"student of {job.teacher}") as share:
            line = Line(shown, share)
            left = max(0.0, (ends - time.time()) / 60)
            return train(job, out, left, line.tell, lambda: bool(shown.stop.reason))

    @task(cache_policy=NO_CACHE, persist_result=False)
    def publish_student(job: Job, out: Path, trained: int) -> dict[str, Any] | None:
        found = publish(job, out, trained)
        return None if found is None else {**asdict(found), "says": str(found)}

    @flow(name="distill", validate_parameters=False)
    def distill(job: dict[str, Any], out: str, minutes: float) -> dict[str, Any]:
        """A student of a release.

        Args:
            job: a pipelines.distill.Job as plain values.
            out: the folder of its states and of the result.
            minutes: most of them for the training; running it again goes on.
        """
        what, folder = Job(**job), Path(out)
        with ExitStack() as resources:
            resources.enter_context(stopping(current_console()))
            trained = train_student(what, folder, time.time() + 60 * minutes)
            evaluation = publish_student(what, folder, trained)
        return {
            "student": out,
            "status": "finished" if trained == what.config.steps else "stopped",
            "steps": trained,
            "of": what.config.steps,
            "num_inference_steps": what.num_inference_steps,
            "evaluation": evaluation,
        }

    return distill


class Line:
    """How far the ranks are: a live line on a terminal, a JSON line every ten seconds elsewhere."""

    def __init__(self, shown: Console, share: Any) -> None:
        self._shown, self._share = shown, share
        self._last = 0.0

    def tell(self, line: dict[str, Any]) -> None:
        if line.get("event") != "progress":
            if line.get("event") == "started" and line["step"]:
                self._shown.say(f"going on at step {line['step']} of {line['steps']}")
            return
        self._share(line["step"] / line["steps"])
        if sys.stderr.isatty():
            left = duration((line["steps"] - line["step"]) * line["seconds"])
            text = f"{line['phase']} {line['step']}/{line['steps']}  loss {line['loss']:.5f}  {line['seconds']:.3f} s a step"
            print(f"\r{text}  {left} left\x1b[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last > JSON_EVERY:
            self._last = time.monotonic()
            print(json.dumps({**line, **values()}), file=sys.stderr, flush=True)


def told(result: dict[str, Any]) -> str:
    """What a person reads at the end."""
    if result["status"] == "prepared":
        return f"{result['job']}: start its ranks (docs/distillation.md), then run the same command without --minutes"
    lines = [f"{result['student']}: {result['steps']} of {result['of']} steps, {result['status']}"]
    if result["status"] == "stopped":
        lines.append("  run the same command again to go on")
    if result["evaluation"]:
        lines += ["  " + line for line in result["evaluation"]["says"].splitlines()]
    else:
        lines.append("  not evaluated: the release has no latents of split validation, or evaluate.samples is 0")
    plan = f"{{num_inference_steps: {result['num_inference_steps']}, guidance_scale: 1}}"
    lines.append(f"  in a spec: generators: [{{model: {result['student']}}}], sampler: {plan}")
    return "\n".join(lines)
