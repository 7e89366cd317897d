"""What DualParal and Ulysses would take on so many devices, from measured times of their parts.

A model of time, not of torch: devices compute one thing at a time, and a message takes its latency and its bytes over the
link's rate while its sender goes on. The order of DualParal's tasks is that of `models.parallel.schedule`.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.parallel.schedule import needs, stage_layers, tasks


@dataclass(frozen=True)
class Link:
    """Seconds before the first byte, and bytes a second."""

    latency: float
    rate: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.rate


@dataclass(frozen=True)
class Costs:
    """Measured, of one window of frames through the denoiser.

    layer, fixed: seconds of one layer, and of what every stage does besides (text, timestep, rotary embedding).
    ends: seconds of the first embedding, the last projection and the scheduler together. weights: bytes of one layer.
    hidden: bytes of a window between stages. velocity: of a block's prediction. cache: of one layer's keys and values.
    """

    layer: float
    fixed: float
    ends: float
    weights: float
    hidden: float
    velocity: float
    cache: float


@dataclass(frozen=True)
class Simulated:
    """`seconds` from the first task to the last; `busy`, `sent`, `held`: of the busiest rank, the one that sends and the one
    that holds most, in seconds and bytes."""

    seconds: float
    busy: float
    sent: float
    held: float


def dualparal(blocks: int, steps: int, stages: int, layers: int, costs: Costs, link: Link) -> Simulated:
    """A video of `blocks` in `steps`, its layers over `stages` devices."""
    shares = [len(share) for share in stage_layers(layers, stages)]
    work = [costs.fixed + share * costs.layer for share in shares]
    work[0] += costs.ends / 2
    work[-1] += costs.ends / 2
    free = [0.0] * stages
    done: dict[object, float] = {}
    for task in tasks(blocks, steps):
        arrived = max([0.0, *(done[need] for need in needs(task, blocks))])
        for stage in range(stages):
            free[stage] = max(free[stage], arrived) + work[stage]
            size = costs.hidden if stage + 1 < stages else costs.velocity
            arrived = free[stage] + (link.seconds(size) if stages > 1 else 0.0)
        done[task] = arrived
    count = blocks * steps
    sent = count * (costs.hidden if stages > 1 else 0.0)
    held = shares[0] * (costs.weights + costs.cache) + 2 * costs.hidden
    return Simulated(max(done.values()), count * max(work), sent, held)


def ulysses(
    tokens: int,
    steps: int,
    ranks: int,
    layers: int,
    layer_seconds: float,
    width_bytes: float,
    weights: float,
    link: Link,
) -> Simulated:
    """The whole video at once: `layer_seconds` for one layer on one device over all tokens, `width_bytes` of one token.

    Four exchanges a layer, of queries, keys, values and what comes out, none hidden behind compute, as diffusers does it.
    """
    part = tokens * width_bytes / ranks
    exchange = 4 * link.seconds(part * (ranks - 1) / ranks) if ranks > 1 else 0.0
    seconds = steps * layers * (layer_seconds / ranks + exchange)
    sent = steps * layers * 4 * part * (ranks - 1) / ranks
    return Simulated(seconds, steps * layers * layer_seconds / ranks, sent, layers * weights + 6 * part)
