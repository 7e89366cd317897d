"""The source of the graph: batches that the driver hands out one by one.

Ray Data reads from a mailbox actor that the driver fills while fewer than so many batches are in flight. That bounds memory,
and makes stopping clean: hand out no more, and everything launched finishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.exceptions import RayError
from ray.util.placement_group import get_placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.ray_session import session_lives
from pipelines.mailbox import Mailbox
from stages.actor import pack
from stages.batch import Batch, size
from stages.group import reserved_by


class MailboxSource(Datasource):
    """Ray Data's view of the mailbox: one long read task that yields a block as soon as there is one."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self._mailbox = mailbox

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        mailbox = self._mailbox

        def read() -> Iterator[pa.Table]:
            number = 0
            while (block := ray.get(mailbox.get.remote(number))) is not None:
                yield block
                number += 1

        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, metadata)]


class Watch(ExecutionCallback):
    """What the driver knows of the graph that runs in this process, one at a time, and how it ends one.

    A batch that kills its worker again when it is retried does not come out: Ray Data only counts it.
    """

    lost: ClassVar[int] = 0
    ending: ClassVar[bool] = False

    def on_execution_step(self, executor: Any) -> None:
        Watch.lost = executor._num_errored_blocks
        if Watch.ending:
            raise GraphEnded("the driver ended the graph")


class GraphEnded(Exception):
    """Raised inside of Ray Data's loop, so that it ends and lets go of its actors."""


class Feeder:
    """The driver's side: numbers batches and keeps at most `in_flight` of them under way."""

    def __init__(self, in_flight: int) -> None:
        # On the driver's machine: no other that is lost takes it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.in_flight = in_flight
        self.launched = 0
        self.closed = False
        self._open: dict[int, Batch] = {}
        Watch.lost, Watch.ending = 0, False

    @property
    def lost(self) -> int:
        """How many of the batches that have not come out never will. Which ones is known when the graph has ended."""
        return min(Watch.lost, len(self._open))

    @property
    def has_room(self) -> bool:
        return not self.closed and len(self._open) - self.lost < self.in_flight

    def put(self, batch: Batch) -> None:
        """Hand out `batch`; its number becomes its `batch_index`."""
        number = self.launched
        batch["batch_index"][:] = number
        self._open[number] = batch
        self.launched += 1
        ray.get(self.mailbox.put.remote(number, pack(batch)))

    def done(self, number: int) -> Batch | None:
        """Note that a batch came out, and give it as it was put; None if it had come out before."""
        batch = self._open.pop(number, None)
        if batch is not None:
            self.mailbox.done.remote(number)
        return batch

    @property
    def batches_in_flight(self) -> int:
        return len(self._open) - self.lost

    @property
    def samples_in_flight(self) -> int:
        """Samples that are still expected, about."""
        expected = len(self._open) - self.lost
        return sum(size(batch) for batch in self._open.values()) * expected // max(1, len(self._open))

    def unfinished(self) -> list[Batch]:
        """Batches that did not come out (yet)."""
        return list(self._open.values())

    def close(self) -> None:
        """Hand out no more. Where the mailbox is gone, so is the graph."""
        if not self.closed:
            self.closed = True
            if not session_lives():
                return
            with contextlib.suppress(RayError):
                ray.get(self.mailbox.close.remote())

    def end(self) -> None:
        """End the graph's actors, whatever they are doing. Where the session is dead, so are they."""
        if not session_lives():
            return
        self.close()
        with contextlib.suppress(RayError):
            for actor_id, actor in ray.get(self.mailbox.actors.remote()).items():
                ray.kill(actor)
                with contextlib.suppress(ValueError):  # it leads no sampler group
                    remove_placement_group(get_placement_group(reserved_by(actor_id)))
            ray.kill(self.mailbox)
