"""The actor that stands between the driver and the graph. It imports little: each run starts one, and waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from stages.actor import pack
from stages.canary import Canaries


@ray.remote(num_cpus=0)
class Mailbox:
    """Batches by their number. A batch stays until it is done, so that a reader that died can start over.

    It also knows the graph's actors: Ray Data lets go of them, but one that is just being started again stays, with its CPU.
    And it holds the canaries of the sampler groups against each other.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, pa.Table] = {}
        self._actors: dict[str, Any] = {}
        self._put = 0
        self._closed = False
        self._changed = asyncio.Condition()
        self._canaries = Canaries()
        self._encoded: asyncio.Future[pa.Table] = asyncio.get_event_loop().create_future()

    async def put(self, number: int, block: pa.Table) -> None:
        async with self._changed:
            self._blocks[number] = block
            self._put = number + 1
            self._changed.notify_all()

    async def done(self, number: int) -> None:
        self._blocks.pop(number, None)

    async def join(self, actor_id: str, actor: Any) -> None:
        self._actors[actor_id] = actor

    async def actors(self) -> dict[str, Any]:
        """By their ids."""
        return self._actors

    async def offer(self, canary: pa.Table) -> None:
        """The canary as it is encoded, for groups that encode nothing."""
        if not self._encoded.done():
            self._encoded.set_result(canary)

    async def encoded(self) -> pa.Table:
        return await asyncio.shield(self._encoded)

    async def differs(self, kind: str, made: np.ndarray) -> str:
        """See stages.canary.Canaries."""
        return self._canaries.differs(kind, made)

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def get(self, number: int) -> pa.Table | None:
        """Batch `number` once it is there, an empty one if it is long done, None after the last."""
        async with self._changed:
            await self._changed.wait_for(lambda: number < self._put or self._closed)
        return self._blocks.get(number, pack({})) if number < self._put else None
