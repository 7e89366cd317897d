"""The arguments that commands share and what they name: a dataset, a spec, a size; what to say of a disk that refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.errors import UserError

if TYPE_CHECKING:
    from infra.storage import Storage
    from pipelines.spec import Spec

SpecPath = Annotated[Path, typer.Argument(help="The spec, a YAML file.", show_default=False)]
Dataset = Annotated[
    str, typer.Argument(help="The dataset: a folder, an fsspec URL, or the spec that made it.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the spec, such as layout.batch_size=4."),
]
Replan = Annotated[bool, typer.Option("--replan", help="Resolve sampler.plan anew, whatever the dataset keeps of it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def stored_dataset(dataset: str) -> Storage:
    """The dataset that a folder, URL or spec names; it must exist."""
    from infra.storage import Storage, reaching
    from infra.tables import dataset_exists

    if dataset.endswith((".yaml", ".yml")):
        from pipelines.resolve import storage_of
        from pipelines.spec import absolute_paths, load_spec

        storage = storage_of(absolute_paths(load_spec(dataset)))
    else:
        root = dataset.rstrip("/") if "://" in dataset else str(Path(dataset).expanduser().resolve())
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        storage = Storage(root, endpoint, allow_http=bool(endpoint and endpoint.startswith("http://")))
    with reaching(storage.root):
        exists = dataset_exists(storage)
    if not exists:
        raise UserError(
            f"{storage.root}: there is no dataset here (no dataset.json); give its folder, URL, or its spec"
        )
    return storage


def spec_of(spec_or_dataset: str, overrides: list[str] | None) -> Spec:
    """The spec at a path, or that of a dataset's newest run."""
    from infra.tables import Table
    from pipelines.spec import load_spec, parse_spec

    if spec_or_dataset.endswith((".yaml", ".yml")):
        return load_spec(spec_or_dataset, overrides)
    rows = Table(stored_dataset(spec_or_dataset), "runs").read(["spec_json", "created_at"]).to_pylist()
    if not rows:
        raise UserError(f"{spec_or_dataset}: no run is recorded here, so there is no spec; give the spec's path")
    return parse_spec(json.loads(max(rows, key=lambda row: row["created_at"])["spec_json"]), overrides)


def nbytes(text: str | None) -> int | None:
    if text is None:
        return None
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "B": 1, "": 1}
    number = text.rstrip("KMGTiB")
    try:
        return int(float(number) * units[text[len(number) :]])
    except (ValueError, KeyError) as error:
        raise UserError(f"--pack: expected a size such as 512MB, found {text!r}") from error


def refusal_of(error: Exception) -> str:
    """What to tell a user whose disk is full or may not be written; empty where that is not what went wrong."""
    from infra.storage import refused
    from models.pack import cache_dir

    if not (said := refused(error)):
        return ""
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return f"the storage cannot be written ({said}); free space or choose another place"
    cache, place = cache_dir(), Path(name)
    if place.is_relative_to(cache) or cache.is_relative_to(place):
        return f"DITMILL_CACHE: {name} cannot be written ({said}); free space, or set it to a folder of your own"
    return f"{name} cannot be written ({said}); free space or choose another place"


def worker_environment() -> None:
    """What workers are started with, for a command that computes in this process; before torch is imported."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
