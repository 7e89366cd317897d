"""The Ray Data graph: which stages share an actor, what each group gets, and how batches flow through them.

    mailbox -> [encode, sample, decode] -> [score, judge, caption, write] -> results

Stages that use the same model share an actor. On a small machine that is all there is: eight actors of one CPU each would
never all start on two cores. With `compute.split: stages` encoding and decoding get actors of their own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.batch import Batch, Stage

REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Group:
    """Actors that run the same stages. `num_cpus` and `num_gpus` are one actor's."""

    name: str
    stages: tuple[Stage, ...]
    actors: int
    num_cpus: float
    num_gpus: float
    drop: tuple[str, ...] = ()
    on_gpu_cluster: bool = False

    @property
    def accelerators(self) -> float:
        """Devices an actor counts for: its GPUs, or 1 where the whole run has none."""
        return self.num_gpus if self.on_gpu_cluster else 1.0


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
    if gpus >= 1:
        judges = fixed.get("judge", max(1, int(gpus) // 8))
        judge_gpu = 0.0 if not needs_model else (0.25 if gpus < 2 else 1.0)
        free = gpus - judges * judge_gpu
        samplers = fixed.get("sample", max(1, int(free)))
        sample_gpu = min(1.0, free / samplers)
        if split and free >= 3:
            encode, sample, decode = generating
            left = samplers - 2 if "sample" not in fixed else samplers
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
    samplers = fixed.get("sample", max(1, int(cpus) - judges - apart))
    share = min(1.0, max(0.1, (cpus - 0.1) / (judges + samplers + apart)))
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
    """Batches under way at most: each actor has one in hand and one waiting, and lost ones must not block the rest."""
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
    }


def results(
    mailbox: Any, groups: tuple[Group, ...], context: dict[str, str], earliest: float, max_errored: int = 4
) -> Iterator[Batch]:
    """Run the graph: the last group's batches as they come out, until the mailbox closes.

    A batch that kills its worker is tried once more and then given up (up to `max_errored` of them): it does not come out.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    from pipelines.feed import MailboxSource
    from stages.actor import StageActor, unpack

    settings = DataContext.get_current()
    settings.enable_progress_bars = False
    settings.max_errored_blocks = max_errored
    settings.print_on_execution_start = False
    # Blocks are of one row, a batch: hand each on at once instead of collecting 128 MiB of them.
    settings.target_max_block_size = 1
    settings.target_min_block_size = 1
    dataset = ray.data.read_datasource(MailboxSource(mailbox), override_num_blocks=1, num_cpus=0.01)
    # Ray Data has no other way yet to bound restarts.
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
    for group in groups:
        dataset = dataset.map_batches(
            StageActor,
            fn_constructor_args=(group.name, group.stages, group.drop, group.accelerators, earliest, context),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=group.num_cpus,
            num_gpus=group.num_gpus or None,
            compute=ActorPoolStrategy(size=group.actors, max_tasks_in_flight_per_actor=2),
            ray_remote_args_fn=_bounded_retries,
        )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for at in range(block.num_rows):
            yield unpack(block.slice(at, 1))
