"""A run from the command line: what differs, then Prefect's server and Ray together, then the flow."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from flows.console import Console, console, places
from infra.prefect_session import prefect_session, wait_until_up
from infra.printable import printable
from infra.ray_session import Cluster, ray_session
from infra.secrets import redact
from infra.storage import reaching
from infra.telemetry import configure
from models.pack import cache_dir

if TYPE_CHECKING:
    from pipelines.spec import Spec

REAL_CHECKPOINT = "ditmill run pipelines/examples/wan-1.3b.yaml   # a real checkpoint, on one GPU"


def run_flow(
    spec: Spec, as_json: bool, retry_failed: bool = False, retry_early: bool = False, replan: bool = False
) -> int:
    """Run `spec` to its end; the exit code."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    from pipelines.differences import difference
    from pipelines.graph import worker_env
    from pipelines.resolve import resolve_spec
    from pipelines.run import check_dataset, open_dataset
    from pipelines.thresholds import find_thresholds, told
    from stages.batch import WorldFault

    configure()
    shown = Console(as_json)
    resolved = resolve_spec(spec, replan=replan)
    with reaching(resolved.storage.root):
        check_dataset(resolved)
        now = find_thresholds(resolved)
        found = difference(now)
    if resolved.chosen is not None:
        shown.say(str(resolved.chosen))
    for line in told(now):
        shown.say(line)
    for line in found.lines(resolved.storage.root):
        shown.say(line)
    if found.nothing_to_do and not (retry_failed and found.failed) and not (retry_early and found.stopped):
        if as_json:
            print(json.dumps({"status": "nothing to do", "dataset": resolved.storage.root, "new": 0}))
        else:
            print(printable("\n".join(places(resolved.storage.root))))
        return 0
    for model, licence in resolved.licences:
        if licence.may_train != "yes" and spec.policy.licences == "warn":
            shown.say(
                f"licence: may outputs of {model} train other models? {licence.may_train}: {licence.name}, {licence.why}"
            )
    open_dataset(resolved)  # what cannot be written is told before anything is started
    env = worker_env(spec.layout.threads)
    with (
        redirect_stdout(sys.stderr),  # Ray prints what befalls its workers; stdout is for results
        prefect_session(cache_dir()),
        ray_session(spec.compute.ray_address, env, spec.compute.limits),  # type: ignore[arg-type]
        console(shown),
    ):
        from flows.notify import Paused
        from flows.synthesize import synthesize

        wait_until_up()
        try:
            plain = json.loads(resolved.spec.model_dump_json())
            synthesize(plain, retry_failed=retry_failed, retry_early=retry_early)
        except Paused as why:
            print(f"ditmill: paused: {why}; look at the report, then run the same command to go on", file=sys.stderr)
            return 1
        except Exception as error:
            if shown.result is not None:
                shown.say(f"done, but Prefect could not be told ({type(error).__name__}: {error})")
            elif isinstance(error, WorldFault):
                said = printable(redact(str(error)))
                print(f"ditmill: the run failed: {said}; run the same command again to resume", file=sys.stderr)
                return 1
            else:
                raise
    if not as_json:
        print(f"  next      {REAL_CHECKPOINT}")
    return 1 if shown.result is None or shown.result["verify"] else 0


def run_annotate(spec: Spec, judge: bool, caption: bool) -> list[Any]:
    """Judge or caption stored media again, as a Ray job that is connected to only if a model must run."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    from contextlib import ExitStack

    from pipelines.annotate import recaption, rejudge
    from pipelines.graph import worker_env
    from pipelines.resolve import resolve_spec
    from pipelines.thresholds import find_thresholds

    configure()
    resolved = find_thresholds(resolve_spec(spec)) if judge else resolve_spec(spec)
    done: list[Any] = []
    with ExitStack() as stack:

        def cluster() -> Cluster:
            env = worker_env(spec.layout.threads)
            return stack.enter_context(ray_session(spec.compute.ray_address, env, spec.compute.limits))  # type: ignore[arg-type]

        if judge:
            done.append(rejudge(resolved, cluster))
        if caption:
            done.append(recaption(resolved, cluster))
    return done
