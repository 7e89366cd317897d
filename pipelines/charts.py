"""The report's charts, as SVG that takes its colours from the page's style (classes, never colours here)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from pipelines.report_data import Split
from pipelines.run_log import Threshold

BINS = 24


@dataclass(frozen=True)
class Step:
    """One bar of the funnel. `kind` is the class that colours it."""

    name: str
    count: int
    kind: str = "step"
    note: str = ""


def funnel(steps: Sequence[Step], width: int = 400) -> Markup:
    """Horizontal bars, longest first: names on the left, counts at the end of each bar."""
    row, left, right = 25, 128, 84
    longest = max((step.count for step in steps), default=0) or 1
    parts = []
    for at, step in enumerate(steps):
        top = at * row
        long = max(1.5, (width - left - right) * step.count / longest)
        parts.append(
            _text(left - 8, top + 15, step.name, "end", "name")
            + _rect(left, top + 4, long, row - 9, step.kind, f"{step.name}: {step.count:,}")
            + _text(left + long + 6, top + 15, f"{step.count:,}", "start", "value")
        )
        if step.note:
            shift = 8 * len(f"{step.count:,}") + 12
            parts.append(_text(left + long + shift, top + 15, step.note, "start", "faint"))
    return _svg(width, row * len(steps), "Funnel", parts)


def histogram(name: str, split: Split, bounds: Sequence[Threshold] = (), width: int = 260) -> Markup:
    """Accepted on rejected samples in bins of equal width, with a line at each threshold."""
    height, floor, pad = 118, 98, 4
    accepted, rejected = split
    low, high = _range(np.concatenate([accepted, rejected]), bounds)
    edges = np.linspace(low, high, BINS + 1)
    counts = [np.histogram(values, edges)[0] for values in (accepted, rejected)]
    tallest = max(1, int((counts[0] + counts[1]).max()))
    bar = (width - 2 * pad) / BINS
    parts = [_line(pad, floor + 0.5, width - pad, floor + 0.5, "axis")]
    for at in range(BINS):
        base = float(floor)
        for kind, found in zip(("accepted", "rejected"), counts, strict=True):
            if found[at]:
                tall = (floor - 24) * found[at] / tallest
                about = f"{edges[at]:.3g} to {edges[at + 1]:.3g}: {found[at]:,} {kind}"
                parts.append(_rect(pad + at * bar + 0.5, base - tall, bar - 1, tall, kind, about))
                base -= tall
    for bound in bounds:
        x = pad + (width - 2 * pad) * (bound.value - low) / (high - low)
        side = "start" if x < width / 2 else "end"
        words = f"{'at least' if bound.least else 'at most'} {number(bound.value)}"
        parts.append(
            _line(x, 8, x, floor, "bound") + _text(x + (4 if side == "start" else -4), 14, words, side, "bound-text")
        )
    parts.append(
        _text(pad, height - 6, number(low), "start", "faint")
        + _text(width - pad, height - 6, number(high), "end", "faint")
    )
    return _svg(width, height, f"Histogram of {name}", parts)


def throughput(times: Mapping[str, Split], stride: int, width: int = 400) -> tuple[Markup, str]:
    """Samples over time, run after run with the pauses between runs left out, and what the highest bar stands for."""
    height, floor, pad, gap = 220, 198, 4, 6
    runs = [
        (run, split, float(min(map(np.min, full))), float(max(map(np.max, full))))
        for run, split in times.items()
        if (full := [values for values in split if len(values)])
    ]
    runs.sort(key=lambda item: item[2])
    if not runs:
        return Markup(""), ""
    total = sum(end - start for _, _, start, end in runs) or 1.0
    bins = 48
    step = _nice_step(total / bins)
    room = width - 2 * pad - gap * (len(runs) - 1)
    shares = [max(1, math.ceil((end - start) / step + 1e-9)) for _, _, start, end in runs]
    bar = room / sum(shares)
    drawn = []
    for (run, split, start, _), share in zip(runs, shares, strict=True):
        edges = start + step * np.arange(share + 1)
        edges[-1] += step * 1e-6
        drawn.append((run, [np.histogram(values, edges)[0] * stride for values in split]))
    tallest = max(1, max(int((a + r).max()) for _, (a, r) in drawn))
    parts = [_line(pad, floor + 0.5, width - pad, floor + 0.5, "axis")]
    x = float(pad)
    for at, (run, counts) in enumerate(drawn):
        if at:
            parts.append(_line(x - gap / 2, 12, x - gap / 2, floor, "pause"))
        for index in range(len(counts[0])):
            base = float(floor)
            for kind, found in zip(("accepted", "rejected"), counts, strict=True):
                tall = (floor - 22) * found[index] / tallest
                if tall:
                    about = f"{run}, {duration(index * step)} in: {found[index]:,} {kind}"
                    parts.append(_rect(x + index * bar + 0.25, base - tall, max(0.5, bar - 0.5), tall, kind, about))
                    base -= tall
        x += bar * len(counts[0]) + gap
    parts.append(_text(pad, 12, f"{number(tallest / step * 60)} a minute", "start", "faint"))
    parts.append(
        _text(pad, height - 6, "0", "start", "faint") + _text(width - pad, height - 6, duration(total), "end", "faint")
    )
    return _svg(width, height, "Samples over time", parts), f"each bar is {duration(step)}"


def stacked(parts_of: Sequence[tuple[str, float, str]], width: int = 400) -> Markup:
    """One bar of (name, value, class) pieces, end to end."""
    total = sum(value for _, value, _ in parts_of) or 1.0
    height, x, parts = 26, 0.0, []
    for name, value, kind in parts_of:
        long = width * value / total
        about = f"{name}: {number(value)} accelerator-seconds, {value / total:.1%}"
        parts.append(_rect(x, 0, max(0.0, long - 0.75), height, kind, about))
        x += long
    return _svg(width, height, "Accelerator-seconds by stage", parts)


def number(value: float) -> str:
    """Three significant digits, with thousands apart and no exponent where a person would write none."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if digits > 6:
        return f"{value:.2e}"
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def _range(values: np.ndarray, bounds: Sequence[Threshold]) -> tuple[float, float]:
    """What the axis covers: 0 to 1 for what looks like a probability."""
    shown = [*(bound.value for bound in bounds), *(values.min(), values.max())] if len(values) else [0.0, 1.0]
    low, high = float(min(shown)), float(max(shown))
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _nice_step(seconds: float) -> float:
    """The next round number of seconds: of a batch, all samples are made at once, so that less than one says nothing."""
    steps = (
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.5,
        1,
        2,
        5,
        10,
        15,
        30,
        60,
        120,
        300,
        600,
        900,
        1800,
        3600,
        7200,
        14400,
        43200,
    )
    return next((float(step) for step in steps if step >= seconds), 86_400.0 * math.ceil(seconds / 86_400))


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(f"{width:g}", f"{height:g}", label)
    return head + Markup("").join(Markup(part) for part in parts) + Markup("</svg>")


def _rect(x: float, y: float, width: float, height: float, kind: str, about: str) -> str:
    return (
        f'<rect class="{escape(kind)}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f"<title>{escape(about)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{escape(kind)}" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'
