"""DualParal's schedule: when which block of frames is at which stage of layers (Wang et al. 2025, arXiv 2505.21070).

Blocks enter a queue one an iteration, and every block in the queue is denoised by one step an iteration, the newest first. So
in iteration n block k takes step n - k, and its past context, block k - 1, is one step cleaner. The order is deterministic: a
block waits for what the iteration before made of itself and of the block before it. Videos follow each other in one queue, so
that it fills and drains once; a video's first block waits for no other. This module knows neither tensors nor ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Task(NamedTuple):
    """One denoiser evaluation: step `step` of block `block`, both from 0, in iteration block + step."""

    block: int
    step: int


def tasks(blocks: int, steps: int) -> Iterator[Task]:
    """Every task in the order in which each stage takes them."""
    for iteration in range(blocks + steps - 1):
        for block in range(min(iteration, blocks - 1), max(iteration - steps, -1), -1):
            yield Task(block, iteration - block)


def needs(task: Task, length: int) -> tuple[Task, ...]:
    """The tasks whose results a task begins with, all of the iteration before: its own last step, and that of its context.

    `length`: blocks of each video.
    """
    block, step = task
    return ((Task(block, step - 1),) if step else ()) + ((Task(block - 1, step),) if block % length else ())


def slots(blocks: int, steps: int, stages: int, length: int | None = None) -> dict[Task, int]:
    """The slot in which each task enters stage 0; it is at stage p in the p-th slot after. A slot is one block through one
    stage. The makespan is max(slots) + stages = blocks * steps + stages^2 - 1 where stages < min(blocks, steps)."""
    found: dict[Task, int] = {}
    slot = -1
    for task in tasks(blocks, steps):
        slot = max([slot + 1, *(found[need] + stages for need in needs(task, length or blocks))])
        found[task] = slot
    return found


def makespan(blocks: int, steps: int, stages: int) -> int:
    """Slots from the first task's start at stage 0 to the last one's end at the last stage."""
    return max(slots(blocks, steps, stages).values()) + stages


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of each stage: as equal as can be, the first ones one longer."""
    share, more = divmod(layers, stages)
    ends = [share * (stage + 1) + min(stage + 1, more) for stage in range(stages)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def block_error(temporal: int, num_frames: int, frames: int, context: int) -> str | None:
    """Why a video of so many frames is no whole number of blocks of latent frames, or None."""
    total = (num_frames - 1) // temporal + 1
    count = max(1, -(-(total - context) // frames))
    if total == count * frames + context:
        return None
    fits = (count * frames + context - 1) * temporal + 1
    return f"num_frames: {num_frames} frames are no whole number of sampler.dualparal's blocks; {fits} are"
