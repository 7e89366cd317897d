"""Packs: small, complete sets of checkpoints that run offline on a CPU. `pack://NAME` in a spec names one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from infra.errors import UserError


def cache_dir() -> Path:
    """Where ditmill keeps what it can make or fetch again: $DITMILL_CACHE, else ~/.cache/ditmill."""
    return Path(os.environ.get("DITMILL_CACHE") or Path.home() / ".cache" / "ditmill").expanduser().absolute()


def _build_tiny(folder: Path) -> None:
    from models.pack.tiny import build

    build(folder)


BUILT: dict[str, tuple[str, Callable[[Path], None]]] = {"tiny": ("1", _build_tiny)}
"""Version and builder of packs that are built on first use. Under one version the bytes stay: they are in sample ids."""

SHIPPED = {"shapes": Path(__file__).parent / "shapes"}
"""Packs whose weights come with ditmill."""

STUDENTS = {"shapes-4step": "shapes"}
"""Packs of a generator that was distilled from another pack's. All that it has in common with that one is taken from there:
what is shipped is the components that differ, and the other parts are not there."""

PARTS = ("generator", "judge", "expander")

_WITHOUT = {
    "generator": "",
    "judge": ", or judge.backend: oracle (or none) and caption: null",
    "expander": ", or leave prompts.expand out",
}
"""What one may do without a part, beside taking that of another pack."""


def pack_part(name: str, part: str) -> Path:
    """Checkpoint folder of one of PARTS; UserError where the pack has no such part."""
    if part != "generator":
        name = STUDENTS.get(name, name)
    folder = Path(pack_folder(name)) / part
    if not folder.is_dir():
        raise UserError(f"pack://{name} has no {part} yet: use pack://tiny{_WITHOUT[part]}")
    return folder


def pack_names() -> list[str]:
    """The packs that are there."""
    return sorted([*BUILT, *SHIPPED, *(name for name in STUDENTS if _differing(name).is_dir())])


@cache
def pack_folder(name: str) -> str:
    """Folder of the pack `name`, built on first use if it is not shipped whole. It holds a checkpoint folder for each of
    PARTS; that of one of STUDENTS for the generator alone."""
    if name in SHIPPED:
        return str(SHIPPED[name])
    if name not in pack_names():
        raise UserError(f"pack://{name}: there is no such pack; there are: {', '.join(pack_names())}")
    return _built(name, *(BUILT[name] if name in BUILT else _student(name)))


def _differing(name: str) -> Path:
    """Folder of what a student's generator is shipped with."""
    return Path(__file__).parent / name / "generator"


def _student(name: str) -> tuple[str, Callable[[Path], None]]:
    """Version, which is that of its content, and builder."""
    from models.source import content_sha256

    own, teacher = _differing(name), pack_part(STUDENTS[name], "generator")
    version = hashlib.sha256("".join(content_sha256(str(path)) for path in (own, teacher)).encode()).hexdigest()[:12]

    def build(folder: Path) -> None:
        made = Path(shutil.copytree(own, folder / "generator"))
        index = json.loads((own / "model_index.json").read_text(encoding="utf-8"))
        for component, value in index.items():
            if isinstance(value, list) and value[0] is not None and not (made / component).exists():
                shutil.copytree(teacher / component, made / component)

    return version, build


def _built(name: str, version: str, build: Callable[[Path], None]) -> str:
    """Folder of the pack in the cache, where `build` puts it if it is not there.

    Safe with any number of processes at once: each builds under a name of its own, and the first rename wins.
    """
    folder = cache_dir() / "packs" / f"{name}-{version}"
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        build(building)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return str(folder)
