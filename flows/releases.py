"""Commands of releases: make one, write it in a trainer's own format, train a student on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.arguments import AsJson, Dataset, Overrides, nbytes, stored_dataset, worker_environment
from infra.printable import printable
from pipelines.exporters import FORMATS

FORMATS_LISTED = "\n\n".join(["Formats:", *(f"{name}: {found.help}" for name, found in FORMATS.items())])


def release(
    dataset: Dataset,
    name: Annotated[str, typer.Argument(help="Name of the release.")],
    where: Annotated[
        str | None, typer.Option(help="SQL condition on its columns; left out, verdict = 'accepted'.")
    ] = None,
    pack: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Repack media into tars of this size, such as 512MB.")
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Drop samples whose perceptual hashes differ in at most so many bits of 64."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Leave out what these releases have or nearly have: names, or all.")
    ] = None,
    cap: Annotated[
        list[str] | None, typer.Option(metavar="BY=NUMBER", help="Most samples, or share (20%), of each value of BY.")
    ] = None,
    rules: Annotated[str | None, typer.Option(metavar="FILE", help="These and more as a YAML file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an immutable, named selection of samples with their latest annotations."""
    from flows.console import looking
    from pipelines.release import release as make_release
    from pipelines.rules import read_rules

    worker_environment()
    held_to = read_rules(rules, near_duplicates, against, cap)
    with looking() as progress:
        made = make_release(stored_dataset(dataset), name, where, nbytes(pack), held_to, progress)
    print(json.dumps(made.as_dict(), indent=2) if as_json else printable(made))


def export(
    dataset: Dataset,
    name: Annotated[str, typer.Option("--release", help="The release to export.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="One of the formats below.")],
    out: Annotated[
        str | None, typer.Option(help="The folder; left out, out/export/<dataset>-<release>-<format>.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="RELEASE",
            help="Only what this earlier release does not have; added to --out where that holds its export.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a release in a trainer's own format. Killed or not, the same command goes on where it was."""
    from flows.console import looking
    from pipelines.export import export as write

    worker_environment()
    try:
        with looking("exporting") as progress:
            done = write(stored_dataset(dataset), name, to, out, since, progress)
    except KeyboardInterrupt:
        print("ditmill: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    print(json.dumps(done.as_dict(), indent=2) if as_json else printable(done))


def distill(
    dataset: Dataset,
    release: Annotated[str, typer.Option(help="Which release to learn from.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the student; running it again goes on.", show_default=False)],
    method: Annotated[str | None, typer.Option(help="reflow, trajectory, consistency or distribution.")] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="Settings as a YAML file.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the weights.")] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Stop after so long and write the student so far; 0: start nothing.")
    ] = 1e9,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a student of fewer steps with DeepSpeed, and compare it with its teacher."""
    worker_environment()
    from flows.distill import run_distill, told
    from pipelines.distill_settings import load_settings

    settings = load_settings(config, overrides or [], method=method, steps=steps)
    made = run_distill(stored_dataset(dataset), release, settings, out.expanduser().resolve(), minutes, as_json)
    print(json.dumps(made, indent=2) if as_json else printable(told(made)))
