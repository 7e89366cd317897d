"""The report: one self-contained HTML page with the gallery, the funnel, the scores, the costs and the runs of a dataset.

The page asks the network for nothing and its content policy forbids it; the same policy lets only the report's own script
run, so that a hostile prompt stays text even if an escape were forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

from infra.secrets import redact
from infra.storage import Storage
from infra.tables import dataset_exists, read_dataset_json
from pipelines import charts
from pipelines.contact_sheet import sheet_of
from pipelines.decisions import read_decisions
from pipelines.gallery import Tile, clamp, gallery
from pipelines.report_data import AFTER_MEDIA, MEDIA_SCORES, Facts, Snapshot, read_facts
from pipelines.run_log import Run, Threshold, thresholds

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_SAMPLES = 500
MAX_BYTES = 30_000_000
REST_BYTES = 400_000
"""What the page weighs besides its cards, at most."""

FAILURES_SHOWN = 50
RUNS_SHOWN = 20
OVERHEAD = {
    "boot": "starting workers",
    "load": "loading models",
    "idle": "waiting for work",
    "unshared": "between stages",
    "repeats": "computed twice",
    "lost": "lost with a worker",
    "tail": "after the last batch",
}
"""What a run's overhead is called in the report."""

SHADES = 8
"""Colours that the style has for stages."""


@dataclass(frozen=True)
class ReportSummary:
    """What a report says, for the line that ends a run."""

    path: str
    nbytes: int
    shown: int
    planned: int
    generated: int
    accepted: int
    rejected: int
    failed: int
    withdrawn: int
    accelerator_seconds: float
    accelerator_seconds_per_accepted: float | None
    funnel: tuple[tuple[str, int], ...]


def build_report(
    storage: Storage,
    out: str = "report/index.html",
    title: str | None = None,
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
    sheet: bool = True,
    refresh: int | None = None,
) -> ReportSummary:
    """Write the page (and `contact_sheet.png` beside it) under the dataset's root, and say what is in it.

    At most `max_samples` samples are shown and the page weighs at most `max_bytes`. Any dataset gives a page: an empty one,
    one with failures only, one whose media are damaged or gone. A browser loads it anew every `refresh` seconds.
    """
    decisions = read_decisions(storage)
    snapshot = Snapshot(storage)
    facts = read_facts(snapshot, decisions)
    tiles = gallery(storage, snapshot, facts, decisions, max_samples, max_bytes - REST_BYTES)
    page = render(facts, tiles, title or _name(storage), key=storage.root, refresh=refresh).encode()
    storage.write_bytes(out, page)
    if sheet:
        folder, _, _ = out.rpartition("/")
        storage.write_bytes(f"{folder}/contact_sheet.png".lstrip("/"), sheet_of(storage, snapshot, facts))
    return ReportSummary(
        path=f"{storage.root.rstrip('/')}/{out}",
        nbytes=len(page),
        shown=len(tiles),
        planned=facts.planned,
        generated=facts.generated,
        accepted=facts.accepted,
        rejected=facts.rejected,
        failed=facts.failed,
        withdrawn=facts.withdrawn,
        accelerator_seconds=facts.accelerator_seconds,
        accelerator_seconds_per_accepted=facts.accelerator_seconds_per_accepted,
        funnel=tuple((step.name, step.count) for step in funnel_steps(facts)),
    )


def render(facts: Facts, tiles: Sequence[Tile], title: str, key: str, refresh: int | None = None) -> str:
    """The page. `key` names the dataset for the labels that the browser remembers."""
    from markupsafe import Markup

    environment = templates()
    environment.filters |= {"number": charts.number, "duration": charts.duration, "clamp": clamp}
    script = _asset("report.js")
    last = facts.runs[-1] if facts.runs else None
    bounds = thresholds(last.spec, last.points) if last else {}
    overtime, overtime_note = charts.throughput(facts.times, facts.stride)
    costs = _costs(facts)
    return environment.get_template("report.html").render(
        title=title,
        refresh=refresh,
        facts=facts,
        last=last,
        made=datetime.now(UTC),
        store_key=hashlib.blake2b(redact(key).encode(), digest_size=8).hexdigest(),
        tiles={verdict: [tile for tile in tiles if tile.verdict == verdict] for verdict in ("accepted", "rejected")},
        shown=len(tiles),
        funnel=charts.funnel(funnel_steps(facts)),
        throughput=overtime,
        throughput_note=overtime_note,
        costs=costs,
        cost_bar=charts.stacked([(name, seconds, shade) for name, seconds, _, shade in costs]),
        cost_total=sum(seconds for _, seconds, _, _ in costs),
        histograms=[
            (name, charts.histogram(name, facts.scores[name], bounds.get(name, ()))) for name in _score_order(facts)
        ],
        bounds=bounds,
        below=lambda name, value: _breaks(bounds.get(name, ()), value),
        score_names=_score_order(facts),
        media_scores=MEDIA_SCORES,
        failures=facts.failures[:FAILURES_SHOWN],
        runs=[(run, _run_facts(run)) for run in reversed(facts.runs[-RUNS_SHOWN:])],
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def templates() -> Environment:
    """What fills in this folder's pages: everything is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("pipelines", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def funnel_steps(facts: Facts) -> tuple[charts.Step, ...]:
    """Planned, stopped early, generated, passed ScoreMedia, screened, judged, accepted, then what failed, by its kind."""
    made = facts.generated + sum(
        failure.count for failure in facts.failures if failure.stage in ("score", *AFTER_MEDIA)
    )
    steps = [charts.Step("planned", facts.planned)]
    if facts.stopped:
        steps.append(charts.Step("stopped early", facts.stopped, "rejected", "rejected"))
    steps.append(charts.Step("generated", made, note=_share(made, facts.planned)))
    if any(cost.stage == "score" for cost in facts.costs):  # prompts alone are not scored
        steps.append(charts.Step("passed ScoreMedia", facts.passed, note=_share(facts.passed, made)))
    if facts.screened:
        steps.append(charts.Step("screened", facts.screened, note=_share(facts.screened, facts.passed)))
    if facts.judged:
        steps.append(charts.Step("judged", facts.judged, note=_share(facts.judged, facts.passed)))
    seen = facts.screened or facts.judged or facts.passed  # a screen may accept without the judge
    steps.append(charts.Step("accepted", facts.accepted, "accepted", _share(facts.accepted, seen)))
    kinds: dict[str, int] = {}
    for failure in facts.failures:
        kinds[failure.error_type] = kinds.get(failure.error_type, 0) + failure.count
    steps += [charts.Step(_short(kind), count, "failed", "failed") for kind, count in list(kinds.items())[:6]]
    return tuple(steps)


def _short(text: str, limit: int = 19) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole and part / whole < 0.995 else ""


def _costs(facts: Facts) -> list[tuple[str, float, float, str]]:
    """(name, accelerator-seconds, CPU-seconds, class), stages in their order, then what went to no sample."""
    found = []
    for at, cost in enumerate(facts.costs):
        found.append((cost.stage, cost.accelerator_seconds, cost.cpu_seconds, f"shade-{at % SHADES}"))
    over = ((OVERHEAD.get(name, name), seconds) for name, seconds in facts.overhead.items())
    return found + [(name, seconds, 0.0, f"over-{at % 3}") for at, (name, seconds) in enumerate(over)]


def _score_order(facts: Facts) -> list[str]:
    """The judge's scores first: they are what people look for."""
    return sorted(facts.scores, key=lambda name: (name in MEDIA_SCORES, name))


def _breaks(bounds: Sequence[Threshold], value: float) -> bool:
    return any(value < bound.value if bound.least else value > bound.value for bound in bounds)


def _run_facts(run: Run) -> list[tuple[str, str]]:
    spec = run.spec
    generators = spec.get("generators") or []
    told: dict[str, Any] = {
        "command": run.command,
        "recipe": spec.get("recipe"),
        "generators": [generator.get("model") for generator in generators if isinstance(generator, Mapping)],
        "sampler": spec.get("sampler"),
        "judge": spec.get("judge"),
        "captions": spec.get("caption"),
        "versions": run.versions,
        "hosts": run.hosts,
        "licences": run.licences,
        "reproducible": run.reproducible,
        "allocated": None if run.allocated is None else f"{charts.number(run.allocated)} accelerator-seconds",
    }
    return [(name, redact(plain(value))) for name, value in told.items() if value]


def plain(value: Any) -> str:
    """A JSON value as a line that a person reads."""
    if isinstance(value, Mapping):
        said = {name: plain(item) for name, item in value.items() if item not in (None, "", [], {})}
        return " · ".join(
            f"{name} ({text})" if isinstance(value[name], Mapping) else f"{name} {text}" for name, text in said.items()
        )
    if isinstance(value, list | tuple):
        return "; ".join(plain(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def _name(storage: Storage) -> str:
    if dataset_exists(storage):
        return str(read_dataset_json(storage).get("name") or "dataset")
    return storage.root.rstrip("/").rpartition("/")[2] or "dataset"


def _asset(name: str) -> str:
    return resources.files("pipelines").joinpath(name).read_text(encoding="utf-8")
