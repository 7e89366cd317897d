"""`ditmill tune`: search the cheapest sampler plan within a budget of quality."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.arguments import AsJson, Overrides, SpecPath, worker_environment
from infra.errors import UserError
from infra.printable import printable


def tune(
    spec_path: SpecPath,
    calibration: Annotated[int, typer.Option(min=1, help="Prompts that the search looks at.")] = 64,
    budget: Annotated[
        str | None,
        typer.Option(help="What may be lost: accuracy=0.01, judge=0.01 or psnr=30; left out, sampler.budget."),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option("--hold-out", min=1, help="Other prompts, for what it found; left out, as many."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Most plans to try.")] = 200,
    seconds: Annotated[float | None, typer.Option(min=0, help="Most seconds to search.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of plans; left out, plans beside the dataset.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Search solver, steps, noise levels, guidance and caches for the cheapest plan within a budget of quality.

    Killed or stopped, the same command goes on. The plan is held to prompts that the search did not see.
    """
    worker_environment()
    from infra.telemetry import LEVEL, configure
    from pipelines.plan_file import plans_folder
    from pipelines.quality import parse_budget
    from pipelines.resolve import resolve_spec
    from pipelines.spec import absolute_paths, load_spec
    from pipelines.tune import Settings
    from pipelines.tune import tune as search

    os.environ.setdefault(LEVEL, "ERROR")  # that a plan of a search skips nothing is no news
    configure()
    spec = absolute_paths(load_spec(spec_path, overrides))
    allowed = spec.sampler.budget if budget is None else parse_budget(budget)
    if allowed is None:
        raise UserError(
            "--budget: expected accuracy=0.01, judge=0.01 or psnr=30, found none; give one, or sampler.budget"
        )
    own = spec.sampler.model_copy(update={"plan": None, "budget": None})
    run = resolve_spec(spec.model_copy(update={"sampler": own}))
    settings = Settings(
        calibration, held_out or calibration, trials, float("inf") if seconds is None else seconds, seed=seed
    )
    folder = plans_folder(spec.output.uri) if out is None else out.expanduser().resolve()
    say = lambda line: print(printable(line), file=sys.stderr, flush=True)  # noqa: E731
    try:
        found = search(run, allowed, settings, folder, say)
    except KeyboardInterrupt:
        print("ditmill: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    print(json.dumps(found.as_dict(), indent=2) if as_json else printable("\n".join(found.lines())))
    if found.plan is None:
        raise SystemExit(1)
