"""Exporters: a release in a trainer's own format. Each is one file; `FORMATS` names them.

pipelines.export drives them. It cuts the release's order into chunks, hands the exporter one after the other, and after each
writes down in the export's folder how far it got. An export that was killed goes on with the chunk it was at, so an exporter
keeps to three rules:

    a chunk written again gives the same bytes, whatever a killed attempt at it has left behind;
    files of earlier chunks are not changed (an index or a README, which `finish` writes, may be);
    what a reader would take for a whole file is one: `infra.storage.replacing` writes beside it and renames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from infra.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from infra.storage import Storage
    from pipelines.samples import StoredSample

State = dict[str, Any]
"""What a format must know of the chunks before, as JSON and small: a latent's shape, a running count. Saved after each chunk
and given to the next process; what a killed chunk has put there is forgotten with it."""


@dataclass(frozen=True)
class Target:
    """Where an export goes to, and what it is made of."""

    out: Path
    """The export's folder; it is there. `export.json` in it is not the exporter's."""
    storage: Storage
    """The dataset."""
    dataset: str
    """Its name."""
    release: str
    since: str | None
    """Only what is not in this release, either in a folder of its own or after that release's export."""


@dataclass(frozen=True)
class Chunk:
    """Samples that are written together. The same export always cuts the same chunks."""

    number: int
    """Of the folder, from 0, without gaps: what its files are named by."""
    first: int
    """How many samples of the folder come before it."""
    samples: Sequence[StoredSample]
    """At least one. A sample reads its tensors when it is asked for them, so go through them one by one."""


class Exporter(Protocol):
    """One format. Made anew by each process with what it has put into `state`; all it does is told by these four calls."""

    def __init__(self, target: Target, state: State) -> None: ...

    def check(self, sample: StoredSample) -> None:
        """UserError where the format cannot hold it, by its row alone: read no tensors.

        Called for every sample before the first is written, and not again when an export goes on. It may note in the
        state what all must have in common.
        """

    def chunk_samples(self, first: StoredSample) -> int:
        """How many samples make a chunk, by the first of the release. See `samples_in`."""

    def write(self, chunk: Chunk) -> None:
        """Write one chunk. UserError where a sample lacks what the format needs."""

    def finish(self) -> None:
        """Write what needs to know of all chunks. Called once they are written, and maybe again."""


@dataclass(frozen=True)
class Format:
    """What the command line says of a format, and where its exporter is."""

    help: str
    exporter: str
    """module:class below this package; imported when it is used."""
    requires: tuple[str, ...] = ()
    """Packages that not every installation has."""


FORMATS: Mapping[str, Format] = {
    "fastvideo-t2v": Format(
        "FastVideo: VAE latents and text embeddings, Parquet (DMD, VSA, finetuning)", "fastvideo:TextToVideo"
    ),
    "fastvideo-ode": Format(
        "FastVideo: denoising trajectories and text embeddings, Parquet (ODE initialisation)", "fastvideo:Trajectories"
    ),
    "fastvideo-text": Format("FastVideo: text embeddings only, Parquet (data-free distillation)", "fastvideo:TextOnly"),
    "causvid-lmdb": Format(
        "CausVid: trajectories, or clean latents, LMDB (ODE initialisation, DMD)", "causvid:OneLmdb"
    ),
    "self-forcing-lmdb": Format("Self-Forcing: the same in 16 shards (ShardingLMDBDataset)", "causvid:ShardedLmdb"),
    "webdataset": Format("WebDataset: tars of media, captions, provenance and tensors", "webdataset:Shards"),
    "hf": Format("Hugging Face datasets: a folder that is a hub dataset, Parquet with a card", "hf:HubFolder"),
}


def exporter_of(name: str) -> type[Exporter]:
    """The exporter of a format. UserError where there is none, or a package that it needs is missing."""
    if name not in FORMATS:
        raise UserError(f"--to: there is no format {name!r}; there are: {', '.join(FORMATS)}")
    found = FORMATS[name]
    if missing := [package for package in found.requires if find_spec(package) is None]:
        raise UserError(f"--to: {name} needs {' '.join(missing)}; pip install {' '.join(missing)}")
    module, _, kind = found.exporter.partition(":")
    exporter: type[Exporter] = getattr(import_module(f"{__name__}.{module}"), kind)
    return exporter


def samples_in(nbytes: int, sample_nbytes: int, most: int = 1000) -> int:
    """How many samples of a size fit into `nbytes`: one at least, `most` at most."""
    return max(1, min(most, nbytes // max(1, sample_nbytes)))
