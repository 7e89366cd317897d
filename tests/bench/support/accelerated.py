"""Plans side by side on the same prompts and noise: what each costs at the denoiser, and what its clips are worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from models.accelerate.genome import bent
from models.accelerate.registry import canonical
from models.generator import load_generator
from models.pack.oracle import match, read
from models.pack.train.intervals import bootstrap
from models.plan import SamplerPlan
from tests.bench.support.distilled import Arm, points_apart
from tests.bench.support.figures import Figure
from tests.bench.support.pack_parts import Asked, Progress, batches

FULL, USUAL = "50 steps", "20 steps, first-block cache"
"""The two baselines: what the checkpoint is meant to be sampled with, and what a practitioner would set."""
LOST, ROUNDING = 1.0, 1e-9
"""Points of accuracy that a plan may lose."""
TUNED = "tuned"
SHIFT = 3.0


@dataclass
class Sampled(Arm):
    """One plan, and what was measured of it. `kind` groups plans of one technique."""

    kind: str = ""
    psnr: list[float] = field(default_factory=list)
    """Of each clip against that of 50 steps, dB."""
    evaluations: list[float] = field(default_factory=list)
    """Block evaluations of each sample."""

    @property
    def accuracy(self) -> float:
        return 100 * float(self.counts[:, 0].sum() / self.counts[:, 1].sum())


def arms_of(
    ref: Any, guidance: float, steps: int, few: int, tuned: dict[str, SamplerPlan], ratios: tuple[float, ...]
) -> list[Sampled]:
    """The baselines first; then fewer steps, each technique alone at two settings, and combinations."""
    full = SamplerPlan(num_inference_steps=50, guidance_scale=guidance)
    loop, usual, short = (replace(full, num_inference_steps=count) for count in (20, steps, few))
    made = [
        Sampled(FULL, ref, full, kind="baseline"),
        Sampled(USUAL, ref, _with(loop, {"technique": "first_block"}), kind="baseline"),
    ]
    made += [
        Sampled(f"{count} steps", ref, replace(full, num_inference_steps=count), kind="fewer steps")
        for count in (20, 12, 8, 6)
    ]
    alone: list[tuple[str, str, list[Any]]] = [
        ("first_block", "threshold", [0.05, 0.3]),
        ("gated_taylor", "threshold", [0.05, 0.2]),
        ("taylorseer", "interval", [2, 4]),
        ("guidance_interval", "low", [0.3, 0.6]),
        ("guidance_reuse", "interval", [2, 4]),
        ("guidance_rescale", "factor", [0.3, 0.7]),
    ]
    if ratios:
        alone.append(("magcache", "threshold", [0.06, 0.2]))
    for name, key, settings in alone:
        for value in settings:
            item = {"technique": name, key: value} | ({"ratios": list(ratios)} if name == "magcache" else {})
            made.append(Sampled(f"{steps} steps, {name} {key} {value:g}", ref, _with(usual, item), kind=name))
    for every in (2, 3):
        item = {"technique": "schedule", "steps": ["all" if at % every == 0 else "*.attn1" for at in range(steps)]}
        made.append(
            Sampled(f"{steps} steps, schedule all every {every}, else attn1", ref, _with(usual, item), kind="schedule")
        )
    for bend in (0.8, 1.25):
        plan = replace(short, sigmas=bent(few, SHIFT, bend))
        made.append(Sampled(f"{few} steps, sigmas bent {bend:g}", ref, plan, kind="sigmas"))
    for shift in (2.0, 5.0):
        made.append(Sampled(f"{few} steps, shift {shift:g}", ref, replace(short, shift=shift), kind="shift"))
    for scheduler, order in (("unipc", 3), ("dpmpp", 2)):
        plan = replace(short, scheduler=scheduler, solver_order=order)
        made.append(Sampled(f"{few} steps, {scheduler} of order {order}", ref, plan, kind="solver"))
    reuse = {"technique": "guidance_reuse", "interval": 2}
    made += [
        Sampled(f"{few} steps, guidance_reuse 2", ref, _with(short, reuse), kind=TUNED),
        Sampled(
            f"{few} steps, first_block 0.3",
            ref,
            _with(short, {"technique": "first_block", "threshold": 0.3}),
            kind=TUNED,
        ),
    ]
    return made + [Sampled(f"tuned: {name}", ref, plan, kind=TUNED) for name, plan in tuned.items()]


def _with(plan: SamplerPlan, *items: dict[str, Any]) -> SamplerPlan:
    return replace(plan, accelerate=canonical(items))


def sample_all(arms: Sequence[Sampled], asked: Asked, batch_size: int, seed: int, say: Progress) -> None:
    """Each plan on each batch of prompts, one after the other, so that a busy hour of the machine is everybody's."""
    for start in range(0, len(asked.prompts), batch_size):
        part = slice(start, start + batch_size)
        some = replace(asked, scenes=asked.scenes[part], prompts=asked.prompts[part], indices=asked.indices[part])
        theirs: np.ndarray | None = None
        for arm in arms:
            for made in batches(arm.ref, arm.plan, some, batch_size, seed, lambda _: None, arm.seconds):
                frames = made["frames"]
                theirs = frames if theirs is None else theirs
                arm.psnr += psnr(frames, theirs).tolist()
                arm.right += [match(read(clip), scene) for clip, scene in zip(frames, some.scenes, strict=True)]
                arm.nfe |= set(made["nfe"].tolist())
                arm.evaluations += block_evaluations(arm, made)
        say(
            f"{min(start + batch_size, len(asked.prompts))} of {len(asked.prompts)} prompts by each of {len(arms)} plans"
        )


def block_evaluations(arm: Sampled, made: dict[str, np.ndarray]) -> list[float]:
    if "accelerated" in made:
        facts = [json.loads(text) for text in made["accelerated"]]
        return [each["block_evaluations"] * (1 - each["skipped"]) for each in facts]
    blocks = len(load_generator(arm.ref).denoisers[0].blocks)
    return [float(nfe) * blocks for nfe in made["nfe"]]


def psnr(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of clips uint8 [n, T, H, W, 3], dB [n]; at most 100."""
    error = ((ours.astype(np.float32) - theirs) ** 2).mean(axis=(1, 2, 3, 4))
    return np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-9)), 100.0)


def table(arms: Sequence[Sampled]) -> str:
    """One line a plan: cost, and what it lost beside 50 steps with the interval of the paired difference."""
    full, usual = arms[:2]
    wide = max(len(arm.name) for arm in arms)
    head = (
        f"{'':{wide}}  CPU s   x less than    NFE  blocks   PSNR   accuracy [95%]        beside 50 steps, points [95%]"
    )
    lines = [head, f"{'':{wide}}         50s   20s+FBC"]
    for arm in arms:
        cost = arm.cost("sample")
        low, high = bootstrap(lambda rows: 100 * float(rows[:, 0].sum() / rows[:, 1].sum()), arm.counts)
        apart, (least, most) = apart_from(arm, full)
        near = "" if arm is full else f"{np.mean(arm.psnr):5.1f}"
        lines.append(
            f"{arm.name:{wide}}  {cost:5.3f}  {full.cost('sample') / cost:4.1f}  {usual.cost('sample') / cost:7.2f}"
            f"  {max(arm.nfe):5d}  {np.mean(arm.evaluations):6.0f}  {near:>5}   {arm.accuracy:5.1f} [{low:5.1f}, {high:5.1f}]"
            f"   {apart:+6.2f} [{least:+6.2f}, {most:+6.2f}]"
        )
    return "\n".join(lines)


def apart_from(arm: Sampled, full: Sampled) -> tuple[float, tuple[float, float]]:
    """Points of accuracy more than those of 50 steps, and the interval of the paired difference."""
    return points_apart(arm.counts, full.counts), bootstrap(points_apart, arm.counts, full.counts)


def figures(arms: Sequence[Sampled]) -> Iterator[Figure]:
    """The cheapest plan that loses at most a point, beside both baselines and beside the best single technique."""
    full, usual = arms[:2]
    kept = [arm for arm in arms[2:] if apart_from(arm, full)[0] >= -LOST - ROUNDING]
    best = min(kept, key=lambda arm: arm.cost("sample"), default=None)
    if best is None:
        yield Figure("best plan", "times less than 50 steps", None, note="none keeps its accuracy")
        return
    for other, target in ((full, 5.0), (usual, 1.5)):
        times = other.cost("sample") / best.cost("sample")
        yield Figure(best.name, f"times less than {other.name}", times, len(best.right), unit="x", target=target)
    single = min((arm for arm in kept if arm.kind != TUNED), key=lambda arm: arm.cost("sample"), default=None)
    tuned = min((arm for arm in kept if arm.kind == TUNED), key=lambda arm: arm.cost("sample"), default=None)
    if single is not None and tuned is not None:
        times = single.cost("sample") / tuned.cost("sample")
        yield Figure(tuned.name, f"times less than {single.name}, alone", times, len(tuned.right), unit="x", target=1.2)


def rows(arms: Sequence[Sampled]) -> list[dict[str, Any]]:
    """What the table holds, as JSON has it."""
    found = []
    for arm in arms:
        apart, (low, high) = apart_from(arm, arms[0])
        found.append(
            {
                "name": arm.name,
                "kind": arm.kind,
                "plan": json.loads(arm.plan.to_json()),
                "cpu_seconds": arm.cost("sample"),
                "nfe": max(arm.nfe),
                "block_evaluations": float(np.mean(arm.evaluations)),
                "psnr": float(np.mean(arm.psnr)),
                "accuracy": arm.accuracy,
                "apart": apart,
                "low": low,
                "high": high,
                "samples": len(arm.right),
            }
        )
    return found
