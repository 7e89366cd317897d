"""Packs: small, complete sets of checkpoints that run offline on a CPU. `pack://NAME` in a spec names one."""

from __future__ import annotations

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

PARTS = ("generator", "judge", "expander")

_WITHOUT = {
    "generator": "",
    "judge": ", or judge.backend: oracle (or none) and caption: null",
    "expander": ", or leave prompts.expand out",
}
"""What one may do without a part, beside taking that of another pack."""


def pack_part(name: str, part: str) -> Path:
    """Checkpoint folder of one of PARTS; UserError where the pack has no such part."""
    folder = Path(pack_folder(name)) / part
    if not folder.is_dir():
        raise UserError(f"pack://{name} has no {part} yet: use pack://tiny{_WITHOUT[part]}")
    return folder


@cache
def pack_folder(name: str) -> str:
    """Folder of the pack `name`, built on first use if it is not shipped. It holds a checkpoint folder for each of PARTS.

    Safe with any number of processes at once: each builds under a name of its own, and the first rename wins.
    """
    if name in SHIPPED:
        return str(SHIPPED[name])
    if name not in BUILT:
        there = ", ".join(sorted([*BUILT, *SHIPPED]))
        raise UserError(f"pack://{name}: there is no such pack; there are: {there}")
    version, build = BUILT[name]
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
