"""Devices that are kept from everybody: placeholders hold them on the Ray cluster for as long as the session lasts.

A device is `NODE/gpuN`, or `NODE/cpu` for a node without GPUs, which counts as one.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NamedTuple

HOLD_SECONDS = 60.0


class Resources(NamedTuple):
    """Of the cluster, or of a device."""

    cpus: float
    gpus: float


_placeholders: dict[str, tuple[Any, Resources]] = {}
"""By device; of the Ray session that this process is in."""


def here() -> str:
    """The device of this Ray worker; several are joined by a comma. Empty outside of Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    node = ray.get_runtime_context().get_node_id()
    return ",".join(f"{node}/gpu{each}" for each in ray.get_gpu_ids()) or f"{node}/cpu"


def hold(device: str, seconds: float = HOLD_SECONDS) -> bool:
    """Keep `device` from everybody. False where it is still in use after `seconds`, or is all that is left."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if device in _placeholders:
        return True
    node, _, name = device.partition("/")
    resources = {each["NodeID"]: each["Resources"] for each in ray.nodes() if each["Alive"]}.get(node)
    if resources is None:
        return True  # its node is gone
    held = Resources(resources.get("CPU", 0.0), 0.0) if name == "cpu" else Resources(0.0, 1.0)
    if _left().gpus - held.gpus < 1 if held.gpus else _left().cpus - held.cpus < 1:
        return False
    number = 1 if name == "cpu" else int(resources.get("GPU", 0))
    placeholder = ray.remote(num_cpus=held.cpus, num_gpus=held.gpus)(_Placeholder).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
    # Ray chooses which of a node's GPUs an actor gets: take all that are free, keep the right one.
    actors = {(actor := placeholder.remote()).gpus.remote(): actor for _ in range(number)}
    waiting, found = list(actors), False
    while waiting and not found:
        ready, waiting = ray.wait(waiting, timeout=seconds)
        if not ready:
            break
        found = name in ("cpu", *(f"gpu{each}" for each in ray.get(ready[0])))
        if found:
            _placeholders[device] = (actors.pop(ready[0]), held)
    for actor in actors.values():
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(actor)
    return found


def left() -> Resources:
    """What the cluster has besides what is held; without bounds where nothing is."""
    return _left() if _placeholders else Resources(float("inf"), float("inf"))


def _left() -> Resources:
    import ray

    total, taken = ray.cluster_resources(), [each for _, each in _placeholders.values()]
    return Resources(
        total.get("CPU", 0.0) - sum(each.cpus for each in taken),
        total.get("GPU", 0.0) - sum(each.gpus for each in taken),
    )


def forget() -> None:
    """The Ray session is over, and the placeholders with it."""
    _placeholders.clear()


class _Placeholder:
    def gpus(self) -> list[str]:
        import ray

        return [str(each) for each in ray.get_gpu_ids()]
