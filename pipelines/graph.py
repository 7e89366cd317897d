"""The Ray Data graph, and how batches flow through it: mailbox -> groups of actors -> results."""

from __future__ import annotations

import os
import queue
import threading
import warnings
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from infra.ray_session import session_lives, started_here
from pipelines.placement import Group
from stages.batch import Batch, WorldFault

if TYPE_CHECKING:
    from ray.data import Dataset

    from pipelines.feed import Feeder

REPO = Path(__file__).resolve().parent.parent
TICK_SECONDS = 0.25
END_SECONDS = 10.0


def _bounded_retries() -> dict[str, int]:
    """Ray Data's default restarts a batch that kills its worker for ever."""
    return {"max_restarts": 20, "max_task_retries": 1}


def worker_env(threads: int) -> dict[str, str]:
    """Environment of every worker; MKL's must be there before torch is imported."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(("DITMILL_", "HF_"))}
    return {
        **passed,
        "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MKL_CBWR": "AUTO,STRICT",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # glibc hands memory back that the next denoising step asks for again: 4% of a small model's time on a CPU.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    }


class GraphBroke(WorldFault):
    """Ray Data gave up: it has told why, but not which batch."""


def results(
    feeder: Feeder,
    groups: tuple[Group, ...],
    context: dict[str, str],
    earliest: float,
    canary: Batch | None = None,
) -> Generator[Batch, None, None]:
    """Run the graph: the last group's batches as they come out, until the feeder is closed and all are out.

    First, and every so often, it yields an empty batch, so that its caller can feed it and look around. A batch that kills
    its worker is tried once more and then given up: it does not come out (see `Feeder.lost`). A graph that breaks raises
    GraphBroke. Closing this iterator early ends the graph and lets go of its actors.

    Args:
        feeder: hands out the batches.
        groups: the actors, in the order in which batches go through them.
        context: bound to every log line of the actors.
        earliest: when the actors were asked for, Unix seconds.
        canary: a batch of one sample that every sampler group makes first (see stages.canary).
    """
    from pipelines.feed import Watch

    out: queue.Queue[Batch | str | None] = queue.Queue()
    arguments = (_dataset(feeder, groups, context, earliest, canary), out)
    thread = threading.Thread(target=_pump, args=arguments, name="graph", daemon=True)
    thread.start()
    try:
        yield {}  # to be fed while its processes start
        while True:
            try:
                item = out.get(timeout=TICK_SECONDS)
            except queue.Empty:
                if not session_lives():
                    raise WorldFault("the Ray session lost its raylet or its control store") from None
                yield {}
                continue
            if item is None:
                return
            if isinstance(item, str):
                raise GraphBroke(item)
            yield item
    finally:
        Watch.ending = True
        thread.join(END_SECONDS)
        feeder.end()


def _dataset(
    feeder: Feeder, groups: tuple[Group, ...], context: dict[str, str], earliest: float, canary: Batch | None
) -> Dataset:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    from pipelines.feed import MailboxSource, Watch
    from stages.actor import StageActor, pack

    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.max_errored_blocks = -1
    settings.custom_execution_callback_classes = [Watch]
    settings.print_on_execution_start = False
    # Blocks are of one row, a batch: hand each on at once instead of collecting 128 MiB of them.
    settings.target_max_block_size = 1
    settings.target_min_block_size = 1
    # Ray Data would keep a share of the CPUs for each group, and let none grow into what another does not use.
    settings.op_resource_reservation_enabled = all(group.most_actors == group.actors for group in groups)
    dataset = ray.data.read_datasource(MailboxSource(feeder.mailbox), override_num_blocks=1, num_cpus=0.01)
    # Ray Data has no other way yet to bound restarts.
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
    for group in _delivered(feeder, groups):
        dataset = dataset.map_batches(
            StageActor,
            fn_constructor_args=(
                group.name,
                group.placed,
                group.drop,
                group.accelerators,
                earliest,
                context,
                feeder.mailbox,
                None if canary is None else pack(canary),
            ),
            # Blocks are of one row. Ray Data takes no "as they are" where there are GPUs.
            batch_size=1 if group.num_gpus else None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=group.num_cpus,
            num_gpus=group.num_gpus or None,
            accelerator_type=group.accelerator_type,
            compute=ActorPoolStrategy(
                min_size=group.actors, max_size=group.most_actors, max_tasks_in_flight_per_actor=2
            ),
            ray_remote_args_fn=_bounded_retries,
        )
    return dataset


def _delivered(feeder: Feeder, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups; on a cluster that was there before, with stages that fetch the models which their machine lacks."""
    if started_here():
        return groups
    from stages.delivery import deliver

    delivery = deliver(stage for group in groups for stage in group.stages)
    if delivery is None:
        return groups
    feeder.mailbox.join.remote("library", delivery.library)  # to be ended with the graph's actors
    return tuple(replace(group, stages=tuple(map(delivery.of, group.stages))) for group in groups)


def _pump(dataset: Dataset, out: queue.Queue[Batch | str | None]) -> None:
    """Move what comes out of Ray Data into `out`; at its end None, or what broke it."""
    from stages.actor import unpack

    try:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for at in range(block.num_rows):
                out.put(unpack(block.slice(at, 1)))
        out.put(None)
    except BaseException as error:
        # As text: the error's frames would hold on to the graph's actors.
        out.put(f"{type(error).__name__}: {error}")
