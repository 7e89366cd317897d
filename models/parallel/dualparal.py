"""DualParal: long video as a queue of blocks of frames through a pipeline of layers (Wang et al. 2025, arXiv 2505.21070).

A block is denoised with the last frames of the block before it as context, one step cleaner than itself, and with the keys
and values that the first frames of the block after it left in each layer, one step noisier. So a window of a few latent
frames is all that any rank ever holds, whatever the video's length; what a rank caches never leaves it; and hidden states
are all that travels. Which task comes when is `schedule.py`'s.

Otherwise than in the authors' code the order is deterministic: latents are the same bits for any number of stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.parallel.attention import Split, rank_in, size_of
from models.parallel.schedule import Task, needs, stage_layers, tasks
from models.parallel.wan import Stage


@dataclass(frozen=True)
class Blocks:
    """A video in blocks: `count` of them of `frames` latent frames each, the first one longer by `context`.

    The video has count * frames + context latent frames.
    """

    count: int
    frames: int
    context: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.frames < 1 or not 0 <= self.context <= self.frames:
            raise ValueError(f"a context of {self.context} frames does not fit {self.count} blocks of {self.frames}")

    @property
    def total(self) -> int:
        return self.count * self.frames + self.context

    def size(self, block: int) -> int:
        return self.frames + (self.context if block == 0 else 0)

    @staticmethod
    def covering(total: int, frames: int, context: int) -> Blocks:
        """The blocks of a video of `total` latent frames; ValueError where they do not come out even."""
        count, rest = divmod(total - context, frames)
        if rest or count < 1:
            raise ValueError(
                f"{total} latent frames are not blocks of {frames} and a context of {context}; the next that are:"
                f" {max(1, count + (rest > 0)) * frames + context}"
            )
        return Blocks(count, frames, context)


def noise_of(first: Tensor, blocks: Blocks, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Noise of each block, [b, c, frames, h, w], all made of the frames of `first`, [b, c, frames + context, h, w].

    A block is a fresh permutation of those frames that are not at the end of the block before it: blocks are alike, and no
    frame comes twice within a window. Each sample has a generator of its own.
    """
    pool = first
    yield pool
    for _ in range(1, blocks.count):
        orders = [torch.randperm(blocks.frames, generator=generator) for generator in generators]
        fresh = torch.stack([sample[:, order] for sample, order in zip(pool, orders, strict=True)])
        pool = torch.cat([pool[:, :, blocks.frames :], fresh], dim=2)
        yield pool[:, :, blocks.context :]


@dataclass(frozen=True)
class Video:
    """What a video is made of. Videos of one queue are alike in shape.

    first: noise, [b, c, frames + context, h, w]. text: embeddings for a block, conditional and unconditional, each
    [b, tokens, width]. generators: of the permutations of noise, one a sample.
    """

    first: Tensor
    text: Callable[[int], tuple[Tensor, Tensor]]
    generators: Sequence[torch.Generator]


@dataclass
class _Block:
    latents: Tensor
    scheduler: Any


class DualParal:
    """The sampler of one rank. Every rank of `stages` (and of the other groups) runs the same tasks in the same order.

    Args:
        transformers: Wan's denoiser, or its two experts; this rank computes some layers of each.
        boundary: the timestep from which on, downwards, the second expert denoises.
        scheduler: makes a fresh scheduler whose timesteps are set: multistep ones remember, so each block has its own.
        steps: how many timesteps.
        guidance_scale: 1 for none.
        stages: the ranks of the layer pipeline, None for one.
        branches: the two ranks of guidance parallel, None where both branches are one batch.
        split: Ulysses inside a stage.
    """

    def __init__(
        self,
        transformers: Sequence[Any],
        scheduler: Callable[[], Any],
        *,
        steps: int,
        boundary: float | None = None,
        guidance_scale: float = 1.0,
        stages: dist.ProcessGroup | None = None,
        branches: dist.ProcessGroup | None = None,
        split: Split | None = None,
    ) -> None:
        self.scheduler, self.steps, self.guidance_scale = scheduler, steps, guidance_scale
        self.stages, self.branches = stages, branches
        self.count, self.at = size_of(stages), rank_in(stages)
        self.boundary = boundary
        self.experts = [
            Stage(transformer, stage_layers(len(transformer.blocks), self.count)[self.at], split or Split())
            for transformer in transformers
        ]
        self.dtype = transformers[0].dtype
        self._sending: deque[tuple[Any, Tensor]] = deque()

    @torch.no_grad()
    def sample(self, videos: Sequence[Video], blocks: Blocks) -> Iterator[tuple[int, int, Tensor]]:
        """Which video, which block, and its latents, [b, c, frames, h, w] float32, as soon as they are done; on the first
        stage only."""
        noises = [noise_of(video.first, blocks, video.generators) for video in videos]
        live: dict[int, _Block] = {}
        waiting: deque[Task] = deque()
        done: set[Task] = set()
        timesteps = self.scheduler().timesteps
        experts = [int(self.boundary is not None and timestep < self.boundary) for timestep in timesteps]
        previous: Task | None = None
        for task in tasks(len(videos) * blocks.count, self.steps):
            video, at = divmod(task.block, blocks.count)
            if self.at == 0:
                while not done.issuperset(needs(task, blocks.count)):
                    yield from self._collect(waiting.popleft(), live, done, blocks, videos)
                if task.step == 0:
                    live[task.block] = _Block(next(noises[video]).float(), self.scheduler())
            follows = previous == Task(task.block + 1, task.step - 1) and at + 1 < blocks.count
            expert = experts[task.step]
            warm = follows and experts[task.step - 1] == expert
            out = self._advance(task, self.experts[expert], warm, live, blocks, videos[video], timesteps[task.step])
            previous = task
            if self.at == 0:
                waiting.append(task)
                if self.count == 1:
                    self._result = out
                    yield from self._collect(waiting.popleft(), live, done, blocks, videos)
        while waiting:
            yield from self._collect(waiting.popleft(), live, done, blocks, videos)
        while self._sending:
            self._sending.popleft()[0].wait()

    def close(self) -> None:
        """Give the denoisers back their own attention."""
        for expert in self.experts:
            expert.close()

    def _advance(
        self,
        task: Task,
        stage: Stage,
        warm: bool,
        live: dict[int, _Block],
        blocks: Blocks,
        video: Video,
        timestep: Tensor,
    ) -> Tensor:
        """One task through this stage; what it makes goes to the next one, the last one's velocity back to the first.

        `warm`: the task before left keys and values of the next block in the same expert.
        """
        first, both = video.first, self.guidance_scale > 1 and self.branches is None
        at = task.block % blocks.count
        copies = 2 if both else 1
        shape = (copies * len(first), first.shape[1], blocks.frames + blocks.context, *first.shape[3:])
        if self.at == 0:
            given = self._window(task, live, blocks).to(self.dtype).repeat(copies, 1, 1, 1, 1)
        else:
            given = torch.empty(stage.hidden_shape(shape), dtype=self.dtype, device=first.device)
            dist.recv(given, self._rank(self.at - 1), group=self.stages)
        window, size = stage.window, first.shape[3] * first.shape[4] // _patch(stage.transformer)
        start = blocks.context if at else 0
        window.tokens = (blocks.frames + blocks.context) * size
        window.kept = (start * size, (start + blocks.context) * size)
        window.future, window.fresh = (window.fresh if warm else {}), {}
        conditional, unconditional = video.text(at)
        if both:
            embeds = torch.cat([conditional, unconditional])
        else:
            embeds = unconditional if rank_in(self.branches) else conditional
        longest = blocks.frames + 2 * blocks.context
        out = stage(given, shape, longest, timestep.expand(shape[0]).to(first.device), embeds.to(self.dtype))
        if self.at + 1 < self.count:
            self._send(out, self.at + 1, most=2)
            return out
        velocity = self._guided(out.float())[:, :, start:].contiguous()
        if self.count > 1:
            # The first stage collects a step's velocity before the block's next step: a whole queue may be on its way.
            self._send(velocity, 0, most=self.steps + self.count)
        return velocity

    def _window(self, task: Task, live: dict[int, _Block], blocks: Blocks) -> Tensor:
        own = live[task.block].latents
        if task.block % blocks.count == 0:
            return own
        before = live[task.block - 1].latents
        return torch.cat([before[:, :, before.shape[2] - blocks.context :], own], dim=2)

    def _guided(self, out: Tensor) -> Tensor:
        """u + w (c - u) of both branches, from the batch's halves or from both ranks."""
        if self.guidance_scale <= 1:
            return out
        if self.branches is None:
            conditional, unconditional = out.chunk(2)
        else:
            conditional, unconditional = torch.empty_like(out), torch.empty_like(out)
            dist.all_gather([conditional, unconditional], out.contiguous(), group=self.branches)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _collect(
        self, task: Task, live: dict[int, _Block], done: set[Task], blocks: Blocks, videos: Sequence[Video]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Step a block with its velocity. A block that is done is given out and stays as the next one's context."""
        if self.count == 1:
            velocity = self._result
        else:
            first = videos[0].first
            shape = (*first.shape[:2], blocks.size(task.block % blocks.count), *first.shape[3:])
            velocity = torch.empty(shape, device=first.device)
            dist.recv(velocity, self._rank(self.count - 1), group=self.stages)
        block = live[task.block]
        timestep = block.scheduler.timesteps[task.step]
        block.latents = block.scheduler.step(velocity, timestep, block.latents, return_dict=False)[0]
        done.add(task)
        done.discard(Task(task.block, task.step - 2))
        if task.step == self.steps - 1:
            live.pop(task.block - 1, None)
            yield *divmod(task.block, blocks.count), block.latents

    def _rank(self, stage: int) -> int:
        assert self.stages is not None
        return dist.get_global_rank(self.stages, stage)

    def _send(self, tensor: Tensor, stage: int, most: int) -> None:
        """Go on while the tensor is on its way, with `most` of them at most: each lives until it has arrived.

        A send over gloo says that it has completed only once it is waited for.
        """
        while len(self._sending) >= most:
            self._sending.popleft()[0].wait()
        tensor = tensor.contiguous()
        self._sending.append((dist.isend(tensor, self._rank(stage), group=self.stages), tensor))


def _patch(transformer: Any) -> int:
    _, height, width = transformer.config.patch_size
    return int(height * width)
