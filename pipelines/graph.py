"""The Ray Data graph: which stages share an actor, what each group gets, and how batches flow through them.

    mailbox -> [encode, sample, decode] -> [score, judge, caption, write] -> results

Stages that use the same model share an actor. On a small machine that is all there is: eight actors of one CPU each would
never all start on two cores. With `compute.split: stages` encoding and decoding get actors of their own.
"""

from __future__ import annotations

import os
import queue
import threading
import warnings
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import UserError
from infra.ray_session import session_lives
from stages.batch import Batch, Stage, WorldFault

if TYPE_CHECKING:
    from ray.data import Dataset

    from pipelines.feed import Feeder

REPO = Path(__file__).resolve().parent.parent
TICK_SECONDS = 0.25
END_SECONDS = 10.0


@dataclass(frozen=True)
class Group:
    """Actors that run the same stages. `num_cpus` and `num_gpus` are one rank's; an actor is one, or leads several."""

    name: str
    stages: tuple[Stage, ...]
    actors: int
    num_cpus: float
    num_gpus: float
    drop: tuple[str, ...] = ()
    on_gpu_cluster: bool = False

    @property
    def ranks(self) -> int:
        return max(getattr(stage, "ranks", 1) for stage in self.stages)

    @property
    def accelerators(self) -> float:
        """Devices an actor counts for, with its ranks: GPUs, or one a rank where the whole run has none."""
        return self.ranks * (self.num_gpus if self.on_gpu_cluster else 1.0)

    @property
    def placed(self) -> tuple[Stage, ...]:
        """The stages, told what their further ranks may ask Ray for."""
        share = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        return tuple(replace(stage, **share) if hasattr(stage, "ranks") else stage for stage in self.stages)  # type: ignore[type-var]


def place(
    generating: tuple[Stage, ...],
    judging: tuple[Stage, ...],
    cpus: float,
    gpus: float,
    actors: dict[str, int] | None = None,
    split: bool = False,
    needs_model: bool = True,
) -> tuple[Group, ...]:
    """Groups for a cluster of `cpus` and `gpus`.

    Args:
        generating: EncodeText, SampleLatents, DecodeLatents.
        judging: ScoreMedia, JudgeQuality, CaptionMedia, WriteShards.
        actors: actors of the groups `sample` and `judge`, where the spec fixes them.
        split: give encode, sample, decode and judge actors of their own.
        needs_model: whether the judging group computes with a model (and so wants a share of a GPU).
    """
    fixed = actors or {}
    ranks = max(getattr(stage, "ranks", 1) for stage in generating)
    if gpus >= 1:
        judges = fixed.get("judge", max(1, int(gpus) // 8))
        judge_gpu = 0.0 if not needs_model else (0.25 if gpus < 2 else 1.0)
        free = gpus - judges * judge_gpu
        if ranks > 1 and free < ranks:
            raise UserError(
                f"layout.parallel: {ranks} ranks want a GPU each, found {free:g} of {gpus:g} free for it; use less"
            )
        samplers = fixed.get("sample", max(1, int(free) // ranks))
        sample_gpu = min(1.0, free / (samplers * ranks))
        if split and free >= 2 + ranks:
            encode, sample, decode = generating
            left = int(free - 2) // ranks if "sample" not in fixed else samplers
            return (
                Group("encode", (encode,), 1, 1, sample_gpu, on_gpu_cluster=True),
                Group("sample", (sample,), max(1, left), 1, sample_gpu, ("cond.",), on_gpu_cluster=True),
                Group("decode", (decode,), 1, 1, sample_gpu, on_gpu_cluster=True),
                Group("judge", judging, judges, 1, judge_gpu, on_gpu_cluster=True),
            )
        return (
            Group("sample", generating, samplers, 1, sample_gpu, ("cond.",), on_gpu_cluster=True),
            Group("judge", judging, judges, 1, judge_gpu, on_gpu_cluster=True),
        )
    apart = 2 if split else 0  # encode and decode
    judges = fixed.get("judge", max(1, int(cpus) // 8))
    samplers = fixed.get("sample", max(1, (int(cpus) - judges - apart) // ranks))
    share = min(1.0, max(0.1, (cpus - 0.1) / (judges + samplers * ranks + apart)))
    if split:
        encode, sample, decode = generating
        return (
            Group("encode", (encode,), 1, share, 0),
            Group("sample", (sample,), samplers, share, 0, ("cond.",)),
            Group("decode", (decode,), 1, share, 0),
            Group("judge", judging, judges, share, 0),
        )
    return (
        Group("sample", generating, samplers, share, 0, ("cond.",)),
        Group("judge", judging, judges, share, 0),
    )


def _bounded_retries() -> dict[str, int]:
    """Ray Data's default restarts a batch that kills its worker for ever."""
    return {"max_restarts": 20, "max_task_retries": 1}


def in_flight(groups: tuple[Group, ...]) -> int:
    """Batches under way at most: each actor has one in hand and one waiting."""
    return 2 * sum(group.actors for group in groups) + 2


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
    feeder: Feeder, groups: tuple[Group, ...], context: dict[str, str], earliest: float
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
    """
    from pipelines.feed import Watch

    out: queue.Queue[Batch | str | None] = queue.Queue()
    arguments = (_dataset(feeder, groups, context, earliest), out)
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


def _dataset(feeder: Feeder, groups: tuple[Group, ...], context: dict[str, str], earliest: float) -> Dataset:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    from pipelines.feed import MailboxSource, Watch
    from stages.actor import StageActor

    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.max_errored_blocks = -1
    settings.custom_execution_callback_classes = [Watch]
    settings.print_on_execution_start = False
    # Blocks are of one row, a batch: hand each on at once instead of collecting 128 MiB of them.
    settings.target_max_block_size = 1
    settings.target_min_block_size = 1
    dataset = ray.data.read_datasource(MailboxSource(feeder.mailbox), override_num_blocks=1, num_cpus=0.01)
    # Ray Data has no other way yet to bound restarts.
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
    for group in groups:
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
            ),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=group.num_cpus,
            num_gpus=group.num_gpus or None,
            compute=ActorPoolStrategy(size=group.actors, max_tasks_in_flight_per_actor=2),
            ray_remote_args_fn=_bounded_retries,
        )
    return dataset


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
