"""A Ray cluster for one run: a running one, or one of this machine that ends with this process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.guardian import guarded

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("flows", "pipelines", "stages", "models", "infra")

CENTRAL = ("raylet", "gcs_server")

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    # A thread that outlives its session must not start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Seconds until processes that cannot reach the cluster's control store give up (Ray waits for 60).
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


@contextlib.contextmanager
def ray_session(
    address: str | None, env: dict[str, str], limits: dict[str, float] | None = None
) -> Iterator[dict[str, float]]:
    """Connect to the cluster at `address`, or start one here; yields its CPUs and GPUs, within `limits`.

    Args:
        address: of a running cluster; None starts one.
        env: environment of every worker.
        limits: most `cpus` and `gpus` to use.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    import ray

    # Of a batch that killed its worker Ray Data prints a page; the driver says it in a line.
    for name, level in (("ray", logging.ERROR), ("ray.data", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)
    runtime_env: dict[str, Any] = {"env_vars": env}
    if address is not None:
        # Other machines have no checkout: send the five rooms, without the packs' weights.
        runtime_env["py_modules"] = [str(REPO / room) for room in ROOMS]
        runtime_env["excludes"] = ["*.safetensors", "__pycache__"]
        runtime_env["env_vars"] = {name: value for name, value in env.items() if name != "PYTHONPATH"}
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            if address is None:
                stack.enter_context(guarded())
            verbose = os.environ.get("DITMILL_LOG_LEVEL", "").upper() in ("DEBUG", "INFO")
            with contextlib.nullcontext() if verbose else _stderr_away():
                ray.init(
                    # "local" starts a cluster also where RAY_ADDRESS names one: specs say where they run.
                    address=address or "local",
                    runtime_env=runtime_env,
                    include_dashboard=False if address is None else None,
                    logging_level="ERROR",
                    log_to_driver=verbose,
                )
            stack.callback(ray.shutdown)
            _own.clear()
            if address is None:
                _own.update(_children())
        found = ray.cluster_resources()
        asked = limits or {}
        cpus = min(found.get("CPU", 1.0), asked.get("cpus", float("inf")))
        gpus = min(found.get("GPU", 0.0), asked.get("gpus", float("inf")))
        yield {"cpus": cpus, "gpus": gpus}


def session_lives() -> bool:
    """Whether the Ray session that this process started, if it did, is whole.

    Ray ends a process at once, without a word, a few seconds after it has lost its raylet or control store; whoever looks
    before can end the session properly and start another.
    """
    return not _own or _own <= _children()


_own: set[tuple[str, int]] = set()
"""The central processes of the session that this process started: name and pid."""


def _children() -> set[tuple[str, int]]:
    import psutil

    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() in CENTRAL and child.status() != psutil.STATUS_ZOMBIE:
                found.add((child.name(), child.pid))
    return found


@contextlib.contextmanager
def _stderr_away() -> Iterator[None]:
    """Ray's C++ part greets on file descriptor 2, whatever the log level; what goes wrong is raised all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
