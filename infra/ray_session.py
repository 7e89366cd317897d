"""A Ray cluster for one run: a running one, or one of this machine that ends with this process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from infra import quarantine
from infra.guardian import guarded
from infra.metrics import export_port

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("flows", "pipelines", "stages", "models", "infra")

KIND = "accelerator_type:"
"""How Ray names the resource that says which accelerator a node has."""

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
    # Milliseconds for which a task whose actor cannot be reached waits to be told that the actor's machine is gone, which
    # Ray finds out within 15 s (it waits for 1). Until then an actor pool takes the actor for alive, and would lose one
    # batch after the other to it.
    "RAY_timeout_ms_task_wait_for_death_info": "16000",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


class Cluster(NamedTuple):
    """What a run may use of its Ray cluster."""

    cpus: float
    gpus: float
    kinds: Mapping[str, float] = MappingProxyType({})
    """GPUs of each accelerator type that Ray knows of."""

    def free(self) -> Cluster:
        """The same without what is kept from everybody (see infra.quarantine)."""
        left = quarantine.left()
        return self._replace(cpus=min(self.cpus, left.cpus), gpus=min(self.gpus, left.gpus))


@contextlib.contextmanager
def ray_session(
    address: str | None, env: dict[str, str], limits: Mapping[str, float] | None = None
) -> Iterator[Cluster]:
    """Connect to the cluster at `address`, or start one here; yields what it has, within `limits`.

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
            port = export_port() if address is None else None
            if address is None:
                stack.enter_context(guarded())
            verbose = os.environ.get("DITMILL_LOG_LEVEL", "").upper() in ("DEBUG", "INFO")
            with _sigterm_kept(), contextlib.nullcontext() if verbose else _stderr_away():
                ray.init(
                    # "local" starts a cluster also where RAY_ADDRESS names one: specs say where they run.
                    address=address or "local",
                    runtime_env=runtime_env,
                    include_dashboard=False if address is None else None,
                    logging_level="ERROR",
                    log_to_driver=verbose,
                    _metrics_export_port=port,
                )
            stack.callback(ray.shutdown)
            _own.clear()
            quarantine.forget()
            if address is None:
                _own.update(_children())
        found = ray.cluster_resources()
        asked = limits or {}
        cpus = min(found.get("CPU", 1.0), asked.get("cpus", float("inf")))
        gpus = min(found.get("GPU", 0.0), asked.get("gpus", float("inf")))
        yield Cluster(cpus, gpus, _kinds(ray.nodes()))


def _kinds(nodes: list[dict[str, Any]]) -> Mapping[str, float]:
    found: dict[str, float] = defaultdict(float)
    for node in nodes:
        for name in node["Resources"] if node["Alive"] else ():
            if name.startswith(KIND):
                found[name.removeprefix(KIND)] += node["Resources"].get("GPU", 0.0)
    return found


def session_lives() -> bool:
    """Whether the Ray session that this process started, if it did, is whole.

    Ray ends a process at once, without a word, a few seconds after it has lost its raylet or control store; whoever looks
    before can end the session properly and start another.
    """
    return not _own or _own <= _children()


def started_here() -> bool:
    """Whether this process started the Ray session, so that all of it is on this machine."""
    return bool(_own)


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
def _sigterm_kept() -> Iterator[None]:
    """Ray puts a handler of its own, which ends the process, in the place of one that finishes what is in hand."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


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
