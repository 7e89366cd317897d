"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import releases, tune
from flows.arguments import (
    AsJson,
    Dataset,
    Overrides,
    Replan,
    SpecPath,
    refusal_of,
    spec_of,
    stored_dataset,
    worker_environment,
)
from infra.errors import UserError
from infra.printable import printable
from infra.secrets import redact

if TYPE_CHECKING:
    from pipelines.spec import Spec

app = typer.Typer(
    name="ditmill",
    help="Prompts and a diffusion transformer in, a training-ready dataset out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, never a traceback."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _complain(error)
        raise SystemExit(2) from None
    except Exception as error:
        if not (mistake := refusal_of(error)):
            raise
        _complain(mistake)
        raise SystemExit(2) from None


def _complain(mistake: object) -> None:
    print(f"ditmill: {printable(redact(str(mistake)))}", file=sys.stderr)


def _say(found: object) -> None:
    """Print for a person: what a prompt or a name brings along does not steer the terminal."""
    print(printable(found))


@app.command()
def make(
    prompt: Annotated[str, typer.Argument(help="What to generate.")],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many samples.")] = 4,
    model: Annotated[
        str | None, typer.Option(help="A model: pack://NAME, a folder, an fsspec URL or a hub id.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Where the dataset goes; left out, out/ and a name made of the prompt.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    open_gallery: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the gallery in a browser at the end.")
    ] = True,
) -> None:
    """Generate, judge and caption samples of one prompt, without a YAML file."""
    from pipelines.starter import spec_for

    spec = spec_for(prompt, number, model=model, uri=out, overrides=overrides or [])
    _run(spec, as_json=as_json)
    if open_gallery and not as_json and sys.stdout.isatty() and "://" not in spec.output.uri:
        import webbrowser

        webbrowser.open(Path(spec.output.uri, "report", "index.html").resolve().as_uri())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("ditmill.yaml"),
    full: Annotated[bool, typer.Option(help="Write every key, with its documentation.")] = False,
    schema: Annotated[bool, typer.Option(help="Write the JSON Schema that editors use, to PATH, instead.")] = False,
) -> None:
    """Write a commented spec to start from."""
    from pipelines.starter import json_schema, starter_spec

    if path.exists():
        raise UserError(f"{path}: exists already; name another file, or remove it")
    text = json.dumps(json_schema(), indent=2) + "\n" if schema else starter_spec(full)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from error
    print(path if schema else f"{path}: edit it, then `ditmill plan {path}` and `ditmill run {path}`")


@app.command()
def plan(
    spec_path: SpecPath,
    overrides: Overrides = None,
    calibrate: Annotated[bool, typer.Option(help="Time one small batch in this process for the estimate.")] = True,
    replan: Replan = False,
    as_json: AsJson = False,
) -> None:
    """What would run, what it would cost, and what differs from what the dataset holds. Runs nothing."""
    worker_environment()
    from pipelines.plan import make_plan, render
    from pipelines.spec import load_spec

    found = make_plan(load_spec(spec_path, overrides), calibrate=calibrate, replan=replan)
    print(json.dumps(found.as_dict(), indent=2) if as_json else printable(render(found, str(spec_path))))


@app.command()
def run(
    spec_path: SpecPath,
    overrides: Overrides = None,
    retry_failed: Annotated[bool, typer.Option(help="Try samples again that failed before.")] = False,
    retry_early: Annotated[bool, typer.Option(help="Finish samples that sampler.early_reject stopped.")] = False,
    replan: Replan = False,
    as_json: AsJson = False,
) -> None:
    """Plan, run, commit and report. Running it again resumes."""
    from pipelines.spec import load_spec

    _run(
        load_spec(spec_path, overrides),
        as_json=as_json,
        retry_failed=retry_failed,
        retry_early=retry_early,
        replan=replan,
    )


def _run(
    spec: Spec, as_json: bool, retry_failed: bool = False, retry_early: bool = False, replan: bool = False
) -> None:
    from flows.session import run_flow

    try:
        code = run_flow(spec, as_json=as_json, retry_failed=retry_failed, retry_early=retry_early, replan=replan)
    except KeyboardInterrupt:
        print("ditmill: interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None
    if code:
        raise SystemExit(code)


@app.command()
def deploy(
    spec_path: SpecPath,
    cron: Annotated[str | None, typer.Option(help="Cron expression; replaces the spec's schedule.")] = None,
    every: Annotated[str | None, typer.Option(help="A duration such as 6h, in the place of cron.")] = None,
    work_pool: Annotated[str, typer.Option(help="Prefect work pool whose workers run it.")] = "ditmill",
    image: Annotated[
        str | None, typer.Option(help="Image that holds ditmill, for pools that start containers.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="No pool: run the ticks here until interrupted.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """A Prefect deployment of the same flow, on a schedule. The spec is stored with it: deploy again when it changes."""
    from pipelines.resolve import resolve_spec
    from pipelines.spec import load_spec

    clock = [f"schedule.{key}={value}" for key, value in (("cron", cron), ("every", every)) if value]
    if clock:
        clock += [f"schedule.{key}=null" for key, value in (("cron", cron), ("every", every)) if not value]
    # Models are looked up here: a mistake is told now and not at night.
    spec = resolve_spec(load_spec(spec_path, [*(overrides or []), *clock])).portable_spec
    from flows import deploy as deployments

    if serve:
        deployments.serve(spec)
        return
    made = deployments.deploy(spec, work_pool, image)
    print(json.dumps(asdict(made), indent=2) if as_json else made)


@app.command()
def status(dataset: Dataset, as_json: AsJson = False) -> None:
    """What a dataset holds and what its live runs are doing."""
    from pipelines.status import dataset_status, render

    found = dataset_status(stored_dataset(dataset))
    print(json.dumps(found, indent=2) if as_json else printable(render(found)))


@app.command()
def stop(dataset: Dataset) -> None:
    """Ask the live runs of a dataset to finish what is in hand, commit and end."""
    from infra.control import live_runs, request_stop

    storage = stored_dataset(dataset)
    live = [beat for beat in live_runs(storage) if not beat.is_stale]
    for beat in live:
        request_stop(storage, beat.run_id)
        _say(f"asked {beat.run_id} on {beat.host} to stop")
    if not live:
        print("no run is live")


@app.command()
def report(
    dataset: Dataset,
    live: Annotated[bool, typer.Option("--live", help="Follow the live runs until they end.")] = False,
    every: Annotated[int, typer.Option(min=1, help="With --live: write the page anew after so many commits.")] = 5,
) -> None:
    """Write the gallery and funnel as one HTML page, and the dataset card."""
    from pipelines.card import write_card
    from pipelines.report import build_report

    storage = stored_dataset(dataset)
    if live:
        from flows.live import report_live

        report_live(storage, every)
    build_report(storage)
    write_card(storage)
    _say(f"{storage.root}/report/index.html")


@app.command()
def verify(
    dataset: Dataset,
    media: Annotated[bool, typer.Option(help="Read every media member and compare its sha256.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check every promise on the stored bytes; exit 1 and a list where one fails."""
    from pipelines.verify import verify as find

    storage = stored_dataset(dataset)
    findings = list(find(storage, read_media=media))
    if as_json:
        print(json.dumps([{"kind": f.kind, "where": f.where, "detail": f.detail} for f in findings], indent=2))
    else:
        for finding in findings:
            _say(finding)
        _say(f"{storage.root}: " + (f"{len(findings)} findings" if findings else "every promise holds"))
    if findings:
        raise SystemExit(1)


@app.command()
def funnel(
    dataset: Dataset,
    sweep: Annotated[str, typer.Option(help="A score: what other bounds on it would keep.")] = "",
    most: Annotated[bool, typer.Option("--most", help="The bound is from above.")] = False,
    as_json: AsJson = False,
) -> None:
    """What each filter of a curated dataset removed, in clips and hours, from what is stored."""
    from pipelines.funnel import read_funnel
    from pipelines.funnel import sweep as swept

    storage = stored_dataset(dataset)
    if sweep:
        points = swept(storage, sweep, "most" if most else "least")
        if as_json:
            print(json.dumps([asdict(point) for point in points], indent=2))
        for point in () if as_json else points:
            unknown = f", {point.unknown:,} unknown" if point.unknown else ""
            sign = "<=" if most else ">="
            _say(f"{sweep} {sign} {point.threshold:.4g}: {point.kept:,} clips, {point.seconds / 3600:.3f} h{unknown}")
        return
    found = read_funnel(storage)
    print(json.dumps(found.as_dict(), indent=2) if as_json else printable("\n".join(found.lines())))


@app.command()
def regenerate(
    dataset: Dataset, sample_id: Annotated[str, typer.Argument(help="Which sample.")], as_json: AsJson = False
) -> None:
    """Make one sample again and compare it with what is stored."""
    from pipelines.regenerate import regenerate as again

    worker_environment()
    made = again(stored_dataset(dataset), sample_id)
    print(json.dumps(made.as_dict(), indent=2) if as_json else printable(made))


@app.command()
def annotate(
    spec_or_dataset: Dataset,
    judge: Annotated[
        bool, typer.Option("--judge", help="Judge stored media again with the spec's judge and thresholds.")
    ] = False,
    caption: Annotated[
        bool, typer.Option("--caption", help="Caption stored media again with the spec's captioner.")
    ] = False,
    labels: Annotated[Path | None, typer.Option(help="A CSV of sample_id,label, as the gallery writes it.")] = None,
    withdraw: Annotated[
        list[str] | None, typer.Option(metavar="SAMPLE_ID", help="Take a sample out of all later releases.")
    ] = None,
    restore: Annotated[list[str] | None, typer.Option(metavar="SAMPLE_ID", help="Take a withdrawal back.")] = None,
    reason: Annotated[str, typer.Option(help="Why it is withdrawn.")] = "",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """New decisions about old samples; nothing is generated and no fact is rewritten."""
    from flows.session import run_annotate
    from pipelines import annotate as annotations

    if not (judge or caption or labels or withdraw or restore):
        raise UserError(
            "annotate: say what: --judge, --caption, --labels FILE, --withdraw SAMPLE_ID or --restore SAMPLE_ID"
        )
    done: list[Any] = []
    storage = stored_dataset(spec_or_dataset)
    if labels:
        done.append(annotations.label(storage, str(labels)))
    if withdraw:
        done.append(annotations.withdraw(storage, withdraw, reason))
    if restore:
        done.append(annotations.restore(storage, restore))
    if judge or caption:
        done += run_annotate(spec_of(spec_or_dataset, overrides), judge=judge, caption=caption)
    for item in done:
        print(json.dumps(item.as_dict()) if as_json else printable(item))


app.command()(releases.release)
app.command(epilog=releases.FORMATS_LISTED)(releases.export)
app.command()(releases.distill)
app.command()(tune.tune)


@app.command()
def models(as_json: AsJson = False) -> None:
    """What can be loaded, and what each family supports."""
    from models.families import table

    rows = table()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for column in rows[0]:
        shown.add_column(str(column).replace("_", " "), overflow="fold")
    for row in rows:
        shown.add_row(*(", ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 180).print(shown)


@app.command()
def vacuum(dataset: Dataset, dry_run: Annotated[bool, typer.Option(help="Only list what would go.")] = False) -> None:
    """Remove what no transaction refers to and no live run is writing."""
    from infra.vacuum import vacuum as remove

    names = remove(stored_dataset(dataset), dry_run=dry_run)
    for name in names:
        _say(name)
    print(f"{len(names)} files {'would be ' if dry_run else ''}removed", file=sys.stderr)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which; a name that is none lists them.")],
) -> None:
    """Run a benchmark; each prints a ratio against its baseline in the same run. Needs a checkout."""
    import subprocess

    repo = Path(__file__).resolve().parent.parent
    if not (repo / "tests" / "bench" / f"{name}.py").exists():
        there = sorted(path.stem for path in (repo / "tests" / "bench").glob("*.py"))
        raise UserError(f"bench: there is no {name}; there are: {', '.join(there) or 'none, this is no checkout'}")
    raise SystemExit(subprocess.call([sys.executable, "-m", f"tests.bench.{name}", *context.args], cwd=repo))


if __name__ == "__main__":
    main()
