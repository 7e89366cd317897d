"""What a search of plans found, as a table and as a picture: cost against loss, and the plans that none beats in both."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from markupsafe import escape

from pipelines.charts import number
from pipelines.quality import QualityBudget
from pipelines.sampling import sampler_keys
from pipelines.search import Tried

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 44, 52
TICKS = 6
BETTER = 15.0
"""dB better than the budget that are still told apart."""

STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif; }
text { fill: #333; } .title { font-size: 14px; font-weight: 600; } .faint { fill: #777; }
.axis { stroke: #999; } .grid { stroke: #eee; }
.tried { fill: #93b4e8; } .given-up { fill: none; stroke: #bbb; } .front { fill: #1d4ed8; }
.line { fill: none; stroke: #1d4ed8; stroke-width: 1.5; } .budget { stroke: #b45309; stroke-dasharray: 5 4; }
.budget-text { fill: #b45309; } .plain { fill: #333; } .winner { fill: none; stroke: #15803d; stroke-width: 2.5; }
"""


def trials_csv(tried: Sequence[Tried], front: Collection[int]) -> str:
    """A line for each plan, in the order in which they were tried. `loss` is as `pipelines.quality.lost` has it."""
    out = io.StringIO()
    columns = ("number", "seconds", "evaluations", "nfe", "loss", "samples", "whole", "front", "plan_id", "sampler")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for each in tried:
        numbers = [
            each.number,
            f"{each.seconds:.5g}",
            f"{each.evaluations:.6g}",
            each.nfe,
            f"{each.loss:.6g}",
            each.samples,
        ]
        marks = [int(each.whole), int(each.number in front)]
        writer.writerow([*numbers, *marks, each.plan.plan_id, json.dumps(sampler_keys(each.plan))])
    return out.getvalue()


def pareto_svg(
    tried: Sequence[Tried], front: Sequence[Tried], budget: QualityBudget, plain_seconds: float, winner: Tried | None
) -> str:
    """A picture that stands alone: seconds of denoising a sample to the right, what is lost upwards."""
    chart = _Chart(tried, budget, plain_seconds)
    parts = [*chart.axes(), *chart.budget_line()]
    for each in tried:
        kind = "tried" if each.whole else "given-up"
        parts.append(chart.dot(each.seconds, each.loss, 3.5, kind, _about(each, budget)))
    if front:
        places = " ".join(f"{chart.x(each.seconds):.1f},{chart.y(each.loss):.1f}" for each in front)
        parts.append(f'<polyline class="line" points="{places}"/>')
        parts += [chart.dot(each.seconds, each.loss, 4.5, "front", _about(each, budget)) for each in front]
    if budget.measure != "psnr":
        parts.append(chart.dot(plain_seconds, 0.0, 5, "plain", "the plan without techniques"))
    if winner is not None:
        parts.append(chart.dot(winner.seconds, winner.loss, 9, "winner", f"chosen: {_about(winner, budget)}"))
    parts += _legend(budget, winner is not None)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="Plans that were tried">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


class _Chart:
    """Where values lie. What lies further up or down than is of interest stands at the edge."""

    def __init__(self, tried: Sequence[Tried], budget: QualityBudget, plain_seconds: float) -> None:
        self.budget = budget
        self.right = 1.05 * max([plain_seconds, *(each.seconds for each in tried)], default=1.0)
        losses = np.array([each.loss for each in tried if each.whole] or [0.0])
        if budget.measure == "psnr":
            self.low = max(float(losses.min()), budget.most - BETTER) - 1
            self.high = max(float(np.quantile(losses, 0.9)), budget.most) + 2
        else:
            room = max(budget.most, 0.005)
            self.low = min(float(losses.min()), 0.0) - room / 2
            self.high = max(6 * room, float(np.quantile(losses, 0.6)))

    def x(self, seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.right

    def y(self, loss: float) -> float:
        share = (float(np.clip(loss, self.low, self.high)) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def dot(self, seconds: float, loss: float, radius: float, kind: str, about: str) -> str:
        return (
            f'<circle class="{kind}" cx="{self.x(seconds):.1f}" cy="{self.y(loss):.1f}" r="{radius:g}">'
            f"<title>{escape(about)}</title></circle>"
        )

    def axes(self) -> Iterator[str]:
        floor, edge = HEIGHT - BOTTOM, WIDTH - RIGHT
        for value in _ticks(0.0, self.right):
            yield _line(self.x(value), TOP, self.x(value), floor, "grid")
            yield _text(self.x(value), floor + 16, number(value), "middle", "faint")
        scale = -1.0 if self.budget.measure == "psnr" else 100.0
        for value in _ticks(self.low * abs(scale), self.high * abs(scale)):
            at = self.y(value / abs(scale))
            yield _line(LEFT, at, edge, at, "grid")
            yield _text(LEFT - 8, at + 4, number(value if scale > 0 else -value), "end", "faint")
        yield _line(LEFT, floor, edge, floor, "axis")
        yield _line(LEFT, TOP, LEFT, floor, "axis")
        what = {
            "accuracy": "points of accuracy lost",
            "judge": "points of the judge's score lost",
            "psnr": "mean PSNR, dB, better below",
        }
        yield _text((LEFT + edge) / 2, HEIGHT - 14, "seconds of denoising a sample", "middle", "")
        yield _text(8, TOP - 10, what[self.budget.measure], "start", "faint")

    def budget_line(self) -> Iterator[str]:
        at = self.y(self.budget.most)
        yield _line(LEFT, at, WIDTH - RIGHT, at, "budget")
        yield _text(WIDTH - RIGHT - 4, at - 5, f"budget {self.budget}", "end", "budget-text")


def _legend(budget: QualityBudget, has_winner: bool) -> Iterator[str]:
    yield _text(WIDTH / 2, 20, "Plans that were tried", "middle", "title")
    kinds = [("tried", "on all prompts"), ("given-up", "given up early"), ("front", "best of both")]
    if budget.measure != "psnr":
        kinds.append(("plain", "without techniques"))
    if has_winner:
        kinds.append(("winner", "chosen"))
    for at, (kind, said) in enumerate(kinds):
        x = WIDTH - RIGHT - 128 * (len(kinds) - at) + 20
        yield f'<circle class="{kind}" cx="{x}" cy="{TOP - 13}" r="5"/>' + _text(x + 10, TOP - 9, said, "start", "")


def _about(tried: Tried, budget: QualityBudget) -> str:
    return (
        f"{tried.number}: {tried.seconds:.3g} s, {budget.in_words(tried.loss)}: {json.dumps(sampler_keys(tried.plan))}"
    )


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers between."""
    step = 10 ** np.floor(np.log10(max(high - low, 1e-9) / TICKS))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS)
    return [float(value) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, said: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'
