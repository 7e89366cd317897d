"""Which stages share an actor, how many actors there are, and what each asks Ray for.

    [encode, sample, decode] -> [score, judge, caption, write]

Stages that use the same model share an actor. On a small machine that is all there is: eight actors of one CPU each would
never all start on two cores. With `compute.split: stages` encoding and decoding get actors of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from infra.errors import UserError
from infra.ray_session import Cluster
from infra.telemetry import log
from pipelines.sections import Section
from stages.batch import Stage

GroupName = Literal["index", "encode", "sample", "decode", "judge"]
APART: tuple[GroupName, ...] = ("encode", "decode")
"""Groups that there are only where stages are split."""
READERS = 2
"""Actors that read stored samples, by those that judge them."""
IDLE = 0.1
"""CPUs of an actor that judges without a model, and so does little more than write. Each sampler leaves as much of its CPU: a
node whose CPUs all have a sampler has room for it."""


def _bounds(value: object) -> object:
    """A number of actors is the least and the most of them."""
    bounds = value if isinstance(value, (list, tuple)) else (value, value)
    if len(bounds) != 2 or any(type(each) is not int for each in bounds) or not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"expected a number of actors, or [least, most] with 1 <= least <= most, found {value!r}")
    return bounds


class ActorResources(Section):
    """What one actor asks Ray for; where a sampler group has several ranks, what each rank does."""

    cpus: float | None = Field(None, gt=0, description="CPUs; left out, 1, or a share where there are few.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs; below 1 several actors share one. Left out, a share of what there is."
    )
    accelerator_type: str | None = Field(
        None, min_length=1, description="Kind of node, by Ray's name of its accelerator, such as H100 or A100."
    )


class Compute(Section):
    """What a run may use."""

    ray_address: str | None = Field(
        None, description="Address of a running Ray cluster; left out, one is started here."
    )
    limits: dict[Literal["cpus", "gpus"], float] = Field({}, description="Most CPUs and GPUs that this run takes.")
    actors: dict[GroupName, Annotated[tuple[int, int], BeforeValidator(_bounds)]] = Field(
        {},
        description="Actors of a group: a number, or [least, most] to begin with the first and to grow while there is work"
        " and room, as on a cluster that scales itself. Left out, as many as fit.",
    )
    resources: dict[GroupName, ActorResources] = Field({}, description="What each actor of a group asks Ray for.")
    split: Literal["auto", "shared", "stages"] = Field(
        "auto",
        description="shared: few actors hold several stages (small machines); stages: each model has its own actors.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Compute:
        apart = [name for name in APART if name in self.actors or name in self.resources]
        if apart and self.split != "stages":
            raise ValueError(f"{apart[0]} has actors of its own with split: stages only; set it, or remove {apart[0]}")
        return self

    def least(self, group: GroupName) -> int | None:
        return self.actors[group][0] if group in self.actors else None

    def asked(self, group: GroupName) -> ActorResources:
        return self.resources.get(group, ActorResources())


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
    most: int = 0
    """Actors that it may grow to, if more than `actors`."""
    accelerator_type: str | None = None

    @property
    def ranks(self) -> int:
        return max(getattr(stage, "ranks", 1) for stage in self.stages)

    @property
    def samples(self) -> bool:
        return any(stage.name == "sample" for stage in self.stages)

    @property
    def accelerators(self) -> float:
        """Devices an actor counts for, with its ranks: GPUs, or one a rank where the whole run has none."""
        return self.ranks * (self.num_gpus if self.on_gpu_cluster else 1.0)

    @property
    def most_actors(self) -> int:
        return max(self.actors, self.most)

    @property
    def placed(self) -> tuple[Stage, ...]:
        """The stages, told what their further ranks may ask Ray for."""
        share = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "accelerator_type": self.accelerator_type,
        }
        return tuple(replace(stage, **share) if hasattr(stage, "ranks") else stage for stage in self.stages)  # type: ignore[type-var]


def place(
    generating: tuple[Stage, ...],
    judging: tuple[Stage, ...],
    cluster: Cluster,
    compute: Compute | None = None,
    needs_model: bool = True,
) -> tuple[Group, ...]:
    """Groups for a cluster.

    Args:
        generating: EncodeText, SampleLatents, DecodeLatents, which are split; or EncodeText alone, which is not.
        judging: ScoreMedia, JudgeQuality, CaptionMedia, WriteShards.
        cluster: what is free for this run.
        compute: what the spec says of actors and their resources.
        needs_model: whether the judging group computes with a model (and so wants a share of a GPU, or a CPU of its own).
    """
    compute = compute or Compute()
    on_gpus = cluster.gpus >= 1 or any(each.gpus for each in compute.resources.values())
    split = compute.split == "stages" or (compute.split == "auto" and cluster.gpus >= 8)
    split = split and len(generating) == 3
    counts, shares = (_on_gpus if on_gpus else _on_cpus)(generating, cluster, compute, split, needs_model)
    stages: dict[GroupName, tuple[Stage, ...]] = {"sample": generating, "judge": judging}
    if "encode" in counts:
        encode, sample, decode = generating
        stages = {"encode": (encode,), "sample": (sample,), "decode": (decode,), "judge": judging}
    groups = tuple(
        Group(
            name,
            stages[name],
            counts[name],
            *shares[name],
            ("cond.",) if name == "sample" else (),
            on_gpus,
            compute.actors.get(name, (0, 0))[1],
            compute.asked(name).accelerator_type,
        )
        for name in stages
    )
    _within(compute, groups)
    for kind in {group.accelerator_type for group in groups} - {None, *cluster.kinds}:
        log().warning("no node has this accelerator yet; its actors wait for one", accelerator_type=kind)
    return groups


def place_stored(
    read: Stage, stages: tuple[Stage, ...], cluster: Cluster, compute: Compute, spare: int = 1
) -> tuple[Group, ...]:
    """Actors for judging, one a GPU, or on a CPU as many as leave `spare` cores to the driver; or as `judge` asks. Where they
    hold GPUs, which must not wait for storage and files, others read for them if there are CPUs left."""
    asked, least = compute.asked("judge"), compute.least("judge")
    if on_gpus := cluster.gpus >= 1 or bool(asked.gpus):
        cpus, gpus = asked.cpus or 1.0, 1.0 if asked.gpus is None else asked.gpus
        count = least or max(1, int(cluster.gpus / (gpus or 1.0)))
    else:
        count = least or max(1, int(cluster.cpus) - spare)
        cpus, gpus = asked.cpus or min(1.0, max(0.1, (cluster.cpus - 0.1) / count)), 0.0
    most = compute.actors.get("judge", (0, 0))[1]
    readers = min(READERS * count, int(cluster.cpus - 0.1 - max(count, most) * cpus)) if on_gpus else 0
    if readers < 1:
        stages = (read, *stages)
    judging = Group("annotate", stages, count, cpus, gpus, (), on_gpus, most, asked.accelerator_type)
    return (judging,) if readers < 1 else (Group("read", (read,), readers, 1.0, 0.0, (), on_gpus), judging)


Counts = dict[GroupName, int]
Shares = dict[GroupName, tuple[float, float]]
"""CPUs and GPUs of an actor, or of each of its ranks."""


def _on_gpus(
    generating: tuple[Stage, ...], cluster: Cluster, compute: Compute, split: bool, needs_model: bool
) -> tuple[Counts, Shares]:
    sample, judge = compute.asked("sample"), compute.asked("judge")
    ranks = _ranks(generating)
    judges = compute.least("judge") or max(1, int(cluster.gpus) // 8)
    usual = (0.25 if cluster.gpus < 2 else 1.0) if needs_model else 0.0
    judge_gpu = _or(judge.gpus, usual)
    room = cluster.kinds.get(sample.accelerator_type, 0.0) if sample.accelerator_type else cluster.gpus
    if not judge.accelerator_type or judge.accelerator_type == sample.accelerator_type:
        room -= judges * judge_gpu
    each = sample.gpus
    if ranks > 1 and each is None and room < ranks:
        raise UserError(
            f"layout.parallel: {ranks} ranks want a GPU each, found {room:g} of {cluster.gpus:g} free for it; use less"
        )
    fixed = compute.least("sample")
    samplers = fixed or max(1, int(room / (ranks * (each or 1.0))))
    if each is None:
        each = min(1.0, room / (samplers * ranks)) if room > 0 else 1.0
    counts: Counts = {"sample": samplers, "judge": judges}
    gpus: dict[GroupName, float] = {"sample": each, "judge": judge_gpu}
    if split and (room >= 2 + ranks or any(name in compute.actors or name in compute.resources for name in APART)):
        counts |= {name: compute.least(name) or 1 for name in APART}
        gpus |= {name: _or(compute.asked(name).gpus, each) for name in APART}
        if fixed is None:
            left = room - sum(counts[name] * gpus[name] for name in APART)
            counts["sample"] = max(1, int(left / (ranks * each)))
    return counts, {name: (_or(compute.asked(name).cpus, 1.0), gpus[name]) for name in counts}


def _on_cpus(
    generating: tuple[Stage, ...], cluster: Cluster, compute: Compute, split: bool, needs_model: bool
) -> tuple[Counts, Shares]:
    ranks = _ranks(generating)
    counts: Counts = {name: compute.least(name) or 1 for name in APART} if split else {}
    each, judge = compute.asked("sample").cpus, compute.asked("judge").cpus
    room = cluster.cpus - sum(counts.values())
    judges = counts["judge"] = compute.least("judge") or max(1, int(cluster.cpus) // 8)
    if needs_model:
        room -= judges
    else:
        judge = _or(judge, IDLE)
        room -= 0.1 + judges * judge
        room = round(room, 6) if each else round(room)
    counts["sample"] = compute.least("sample") or max(1, int(room / (ranks * (each or 1.0))))
    asked = {name: compute.asked(name).cpus for name in counts} | {"judge": judge}
    units = {name: count * (ranks if name == "sample" else 1) for name, count in counts.items()}
    free = cluster.cpus - 0.1 - sum(units[name] * (asked[name] or 0.0) for name in counts)
    most = 1.0 if needs_model else 1.0 - IDLE
    share = min(most, max(0.1, free / max(1, sum(units[name] for name in counts if asked[name] is None))))
    return counts, {name: (_or(asked[name], share), 0.0) for name in counts}


def _ranks(stages: tuple[Stage, ...]) -> int:
    return max(getattr(stage, "ranks", 1) for stage in stages)


def _or(asked: float | None, usual: float) -> float:
    return usual if asked is None else asked


def _within(compute: Compute, groups: tuple[Group, ...]) -> None:
    """UserError where what the spec asks for, at its most, is beyond the spec's own limits."""
    if not compute.actors and not compute.resources:
        return
    for name, limit in compute.limits.items():
        wanted = [(group, group.ranks * (group.num_cpus if name == "cpus" else group.num_gpus)) for group in groups]
        if (taken := sum(group.most_actors * each for group, each in wanted)) > limit:
            said = ", ".join(f"{group.name} {group.most_actors} x {each:.2g}" for group, each in wanted)
            raise UserError(
                f"compute.limits.{name}: expected at least the {taken:g} that the actors may take ({said}), found {limit:g};"
                " raise it, or lower compute.actors or compute.resources"
            )


def in_flight(groups: tuple[Group, ...]) -> int:
    """Batches under way at most: each actor has one in hand and one waiting."""
    return 2 * sum(group.most_actors for group in groups) + 2
