"""An export: a release written in a trainer's own format, chunk by chunk, so that it can be killed, resumed and extended.

    <out>/export.json       what it is made of, and how far it got; rewritten after each chunk
    <out>/...               the format's own files

Chunks follow the release's own order, so a run that goes on skips rows, reads no tensor twice, and ends with the files of a
run that was never killed. `since` adds the samples that a later release has to the export of an earlier one: more chunks,
in new files.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage import Storage, make_folder, replacing
from infra.tables import read_dataset_json
from pipelines.exporters import Chunk, Exporter, State, Target, exporter_of
from pipelines.release import read_release
from pipelines.samples import read_samples
from pipelines.signatures import Progress

STATE = "export.json"
VERSION = 1


@dataclass(frozen=True)
class Exported:
    """What an export came to."""

    format: str
    out: str
    dataset: str
    release: str
    since: str | None
    samples: int
    """Of this release, without those of `since`."""
    in_folder: int
    """Samples of all releases that the folder holds."""
    nbytes: int
    """Of the folder."""
    left: int
    """Samples that were exported before and that this release does not have: they stay where they are."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        said = f"{self.out}: {self.format}, {self.samples} samples of {self.release}"
        if self.since is not None:
            said += f" that are not in {self.since}, {self.in_folder} in all"
        said += f"; {self.nbytes:,} bytes"
        if self.left:
            said += (
                f"; {self.left} samples that were exported before are no longer in {self.release}, and stay where they are:"
                f" to be without them, export {self.release} whole"
            )
        return said


@dataclass
class Part:
    """What of one release is in the folder."""

    release: str
    since: str | None
    manifest_sha256: str
    samples: int
    chunk_samples: int
    chunks_done: int = 0
    complete: bool = False

    @property
    def chunks(self) -> int:
        return -(-self.samples // self.chunk_samples)

    @property
    def samples_done(self) -> int:
        return min(self.samples, self.chunks_done * self.chunk_samples)


@dataclass
class Folder:
    """`export.json`."""

    format: str
    dataset: str
    parts: list[Part] = field(default_factory=list)
    state: State = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> Folder | None:
        """What an export has written down here; None where nothing is. UserError where anything else is."""
        try:
            said = json.loads((out / STATE).read_bytes())
            if said.pop("version") == VERSION:
                return cls(**said | {"parts": [Part(**part) for part in said["parts"]]})
        except FileNotFoundError:
            if any(path.name != f"{STATE}.tmp" for path in out.iterdir()):
                raise UserError(
                    f"--out: {out} is not empty and is no export (no {STATE}); choose another folder"
                ) from None
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise UserError(f"--out: {out}/{STATE} is not of this version of ditmill; choose another folder")

    def write(self, out: Path) -> None:
        with replacing(out / STATE) as file:
            file.write(json.dumps({"version": VERSION} | asdict(self), indent=1).encode() + b"\n")

    def part(self, made: Release, before: Release | None, out: Path) -> Part | None:
        """The part of a release, complete or not; None where it may be begun. UserError where it may not."""
        since = None if before is None else before.name
        for part in self.parts:
            if (part.manifest_sha256, part.since) == (made.sha256, since):
                return part
        if not self.parts:
            return None
        last = self.parts[-1]
        holds = f"--out: {out} holds {last.release} of {self.dataset}"
        if before is None or before.sha256 != last.manifest_sha256:
            raise UserError(
                f"{holds}; add to it with --since {last.release} of the same dataset, or choose another folder"
            )
        if not last.complete:
            raise UserError(f"{holds}, not all of it; export {last.release} to its end before what comes --since it")
        return None


@dataclass(frozen=True)
class Release:
    """What an export has to know of a release."""

    name: str
    rows: int
    sha256: str
    """Of its manifest: another dataset's release may have its name."""

    @classmethod
    def read(cls, storage: Storage, name: str) -> Release:
        made = read_release(storage, name)
        manifest = storage.read_bytes(f"{made.folder}/manifest.json")
        return cls(name, made.rows, hashlib.sha256(manifest).hexdigest())


def export(
    storage: Storage,
    release: str,
    to: str,
    out: str | None = None,
    since: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write a release in a format, or go on with it.

    Args:
        storage: the dataset.
        release: its name.
        to: the format, a key of pipelines.exporters.FORMATS.
        out: a local folder, new, empty, or of this export; left out, out/export/<dataset>-<release>-<format>.
        since: an earlier release: only samples that it does not have. Where the folder holds the export of that release,
            they are added to it in new files.
        progress: told how many samples of how many are written.

    UserError where the release or the format is not there, the folder is of something else, or the samples do not have
    what the format needs.
    """
    kind = exporter_of(to)
    if since == release:
        raise UserError(f"--since: {release} is the release that is exported; name an earlier one")
    made = Release.read(storage, release)
    before = None if since is None else Release.read(storage, since)
    dataset = str(read_dataset_json(storage).get("name") or "dataset")
    folder = _folder(out, dataset, release, to, since)
    with _alone(folder):
        held = Folder.read(folder) or Folder(to, dataset)
        if held.format != to or held.dataset != dataset:
            raise UserError(
                f"--out: {folder} holds {held.dataset} as {held.format}, not {dataset} as {to}; choose another folder"
            )
        part = held.part(made, before, folder)
        exporter = kind(Target(folder, storage, dataset, release, since), held.state)
        earlier = list(itertools.takewhile(lambda each: each is not part, held.parts))
        known = _known(storage, earlier, since)
        if part is None:
            part = _begin(storage, exporter, made, since, known)
            held.parts.append(part)
            held.write(folder)
        if not part.complete:
            _write(storage, exporter, held, part, known, folder, progress)
        elsewhere = held.parts[0].since
    return Exported(
        format=to,
        out=str(folder),
        dataset=dataset,
        release=release,
        since=since,
        samples=part.samples,
        in_folder=sum(each.samples_done for each in held.parts),
        nbytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        left=(read_release(storage, elsewhere).rows if elsewhere else 0)
        + sum(each.samples for each in (*earlier, part))
        - made.rows,
    )


def _known(storage: Storage, earlier: list[Part], since: str | None) -> tuple[str, ...]:
    """The releases whose samples are not written (again): `since` alone would let one that was withdrawn for a release, and
    restored, come twice. UserError where one of them is not what was exported."""
    for part in earlier:
        if Release.read(storage, part.release).sha256 != part.manifest_sha256:
            raise UserError(
                f"--out: it holds another {part.release} than the dataset has now; export to a folder of its own"
            )
    names = (*itertools.chain(*((part.since, part.release) for part in earlier)), since)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _begin(storage: Storage, exporter: Exporter, made: Release, since: str | None, known: tuple[str, ...]) -> Part:
    """Look at every row once: what is refused is refused before hours of writing."""
    samples, chunk_samples = 0, 1
    for sample in read_samples(storage, made.name, since=known):
        exporter.check(sample)
        samples += 1
        if samples == 1:
            chunk_samples = exporter.chunk_samples(sample)
    return Part(made.name, since, made.sha256, samples, chunk_samples)


def _write(
    storage: Storage,
    exporter: Exporter,
    held: Folder,
    part: Part,
    known: tuple[str, ...],
    out: Path,
    progress: Progress,
) -> None:
    samples = itertools.islice(read_samples(storage, part.release, since=known), part.samples_done, None)
    earlier = [each for each in held.parts if each is not part]
    chunks_before, samples_before = sum(each.chunks for each in earlier), sum(each.samples for each in earlier)
    progress(part.samples_done, part.samples)
    while chunk := list(itertools.islice(samples, part.chunk_samples)):
        exporter.write(Chunk(chunks_before + part.chunks_done, samples_before + part.samples_done, chunk))
        part.chunks_done += 1
        held.write(out)
        progress(part.samples_done, part.samples)
    exporter.finish()
    part.complete = True
    held.write(out)


def _folder(out: str | None, dataset: str, release: str, to: str, since: str | None) -> Path:
    if out is None:
        name = "-".join([re.sub(r"[^A-Za-z0-9._-]", "_", dataset), release, to])
        folder = Path("out", "export", name if since is None else f"{name}-since-{since}")
    elif "://" in out:
        raise UserError(f"--out: expected a folder of this machine, found {out}; export to a folder and copy it there")
    else:
        folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder")
    return folder


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder, made where it is not there, for this process alone. Filesystems without locks leave that to the user."""
    new = not out.exists()
    make_folder("--out", out)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out: another export is writing to {out}; wait for it, or choose another folder"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
        if new:
            with suppress(OSError):  # nothing was written, so nothing is to be seen
                out.rmdir()
