"""Stages over several ranks: a sampler group, which acts as one actor of the graph.

The actor that holds these stages is rank 0. The other ranks are Ray actors in a placement group, which start with it and die
with it: where a rank is lost the whole group goes down, Ray starts it anew and gives it the batch again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import traceback
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infra.errors import UserError
from infra.quarantine import here
from infra.telemetry import bound, configure, log, values
from stages.batch import Batch, HoldsStage, Stage, WorldFault
from stages.delivery import Delivered

START_SECONDS = 600.0
"""Until all ranks of a group have found each other and loaded."""
COLLECTIVE_SECONDS = 600.0
"""After so long a rank that waits for another gives up."""
GRACE_SECONDS = 30.0
"""For the other ranks to end a batch after rank 0 has."""
LOST = "lost"
"""How an error begins that is the group's and no batch's."""
_COLLECTIVES = f"torch{os.sep}distributed{os.sep}"


@dataclass(frozen=True)
class InGroup(HoldsStage):
    """`stage` by a group of `ranks`. The rest is what each rank but the first asks Ray for."""

    ranks: int
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    accelerator_type: str | None = None

    def load(self) -> None:
        self._group().load(self.stage)

    def devices(self) -> list[str]:
        """Those of the ranks but the first."""
        return ray.get([peer.here.remote() for peer in self._group().peers])

    def __call__(self, batch: Batch) -> Batch:
        return self._group()(self.stage, batch)

    def _group(self) -> SamplerGroup:
        return _group(self.ranks, self.num_cpus, self.num_gpus, self.accelerator_type)


@cache
def _group(ranks: int, num_cpus: float, num_gpus: float, accelerator_type: str | None) -> SamplerGroup:
    """The group of this process, which is its rank 0."""
    return SamplerGroup(ranks, num_cpus, num_gpus, accelerator_type)


class SamplerGroup:
    """Rank 0 and its peers."""

    def __init__(self, ranks: int, num_cpus: float, num_gpus: float, accelerator_type: str | None = None) -> None:
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self.store = store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_seconds(START_SECONDS))
        kind = {f"accelerator_type:{accelerator_type}": 0.001} if accelerator_type else {}
        place = _reserve(ranks, {"CPU": num_cpus} | ({"GPU": num_gpus} if num_gpus else {}) | kind)
        self.peers = [
            _Peer.options(  # type: ignore[attr-defined]
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                accelerator_type=accelerator_type,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, at),
            ).remote(at + 1, values())
            for at in range(ranks - 1)
        ]
        living = [peer.live.remote() for peer in self.peers]
        threading.Thread(target=_end_together, args=(living, place), name="peers", daemon=True).start()
        joining = [peer.join.remote(ranks, host, store.port) for peer in self.peers]
        join(0, ranks, store)
        ray.get(joining, timeout=START_SECONDS)
        log().info("sampler group started", ranks=ranks)

    def load(self, stage: Stage) -> None:
        """Load what `stage` needs on all ranks, at the same time; before, however long it takes, fetch what a node lacks."""
        if isinstance(stage, Delivered):
            fetching = [peer.fetch.remote(stage) for peer in self.peers]
            stage.fetch()
            if why := next(filter(None, ray.get(fetching)), ""):
                raise WorldFault(why)
        loading = [peer.load.remote(stage) for peer in self.peers]
        stage.load()
        ray.get(loading, timeout=START_SECONDS)

    def __call__(self, stage: Stage, batch: Batch) -> Batch:
        """What rank 0 makes. An error that all ranks met alike is the batch's own; any other ends the group."""
        shared = ray.put(batch)
        running = [peer.run.remote(stage, shared) for peer in self.peers]
        made, error = None, None
        try:
            made = stage(batch)
        except Exception as found:
            error = found
        _, late = ray.wait(running, num_returns=len(running), timeout=GRACE_SECONDS)
        outcomes = [told(error), *(None if ref in late else _outcome(ref) for ref in running)]
        if why := disagreement(outcomes):
            _end(why)
        if error is not None:
            raise error
        assert made is not None
        return made


@ray.remote(max_restarts=0, max_concurrency=2)
class _Peer:
    """A rank but the first. It does what rank 0 does, and keeps what comes out to itself."""

    def __init__(self, rank: int, context: dict[str, str]) -> None:
        configure(**context)
        self.rank = rank

    def live(self) -> None:
        """Never returns: that it is lost tells rank 0 that this rank is."""
        threading.Event().wait()

    def join(self, ranks: int, host: str, port: int) -> None:
        from torch.distributed import TCPStore

        join(self.rank, ranks, TCPStore(host, port, is_master=False, timeout=_seconds(START_SECONDS)))

    def here(self) -> str:
        return here()

    def fetch(self, stage: Delivered) -> str:
        """Why it could not, "" if it could."""
        with bound(rank=self.rank):
            try:
                stage.fetch()
            except WorldFault as error:
                return str(error)
        return ""

    def load(self, stage: Stage) -> None:
        with bound(rank=self.rank):
            stage.load()

    def run(self, stage: Stage, batch: Batch) -> str:
        """What went wrong, "" for nothing."""
        with bound(rank=self.rank):
            try:
                stage(batch)
            except Exception as error:
                return told(error)
        return ""


def _outcome(ref: Any) -> str:
    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError as error:
        return f"{LOST}: {type(error).__name__}"


def told(error: Exception | None) -> str:
    """An error in a line, "" for none. One out of a collective is named by it."""
    if error is None:
        return ""
    inside = [frame.name for frame in traceback.extract_tb(error.__traceback__) if _COLLECTIVES in frame.filename]
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"{LOST} in {inside[-1]}: {text}" if inside else text


def disagreement(outcomes: list[str | None]) -> str:
    """Why the ranks of a group cannot go on together, "" if they can. `outcomes`: what `told` says of each rank, None of one
    that did not end."""
    late = [f"rank {rank}" for rank, outcome in enumerate(outcomes) if outcome is None]
    if late:
        first = outcomes[0] or "ended it"
        return f"{', '.join(late)} did not end the batch within {GRACE_SECONDS:.0f} s; rank 0: {first}"
    lost = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if str(outcome).startswith(LOST)]
    if lost:
        return "; ".join(lost)
    failed = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if outcome]
    return f"some ranks failed and others did not; {'; '.join(failed)}" if 0 < len(failed) < len(outcomes) else ""


def join(rank: int, ranks: int, store: Any) -> None:
    """Make this process rank `rank` of the process group, which waits for all of them."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=_seconds(COLLECTIVE_SECONDS))


def reserved_by(actor_id: str) -> str:
    """Name of the placement group of the group that this actor leads."""
    return f"sampler-group-{actor_id}"


def _reserve(ranks: int, share: dict[str, float]) -> PlacementGroup:
    """Room for all ranks at once, on one node if they fit. An actor that is started again finds what it had reserved."""
    name = reserved_by(ray.get_runtime_context().get_actor_id())
    with contextlib.suppress(ValueError):
        return get_placement_group(name)
    place = placement_group([dict(share) for _ in range(ranks - 1)], strategy="PACK", name=name)
    if not place.wait(START_SECONDS):
        raise UserError(
            f"layout.parallel: the cluster has no room for {ranks} ranks of {share}; use smaller degrees or more nodes"
        )
    return place


def _end_together(living: list[Any], place: PlacementGroup) -> None:
    """Wait until a rank is lost, and end this one; unless it was let go with its place, as a run does at its end."""
    ray.wait(living, num_returns=1)
    if placement_group_table(place)["state"] != "REMOVED":
        _end("a rank was lost")


def _end(why: str) -> None:
    """End this process, and with it the group: a rank that waits in a collective could not be called back."""
    log().error("sampler group ended", why=why)
    os._exit(1)


def _seconds(count: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=count)
