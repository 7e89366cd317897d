"""Makes `harness` importable for the tests beside it; a run that nobody disturbed, and a disk that can be filled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from harness import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Iterator[Reference]:
    """A run of the killed runs' spec that nobody disturbed."""
    from harness import Launch, Reference, Watched, kill_spec

    folder = tmp_path_factory.mktemp("reference")
    spec = kill_spec(folder / "reference.yaml")
    launch = Launch(["run", str(spec)], folder / "log")
    assert launch.wait() == 0, launch.said()
    assert launch.left_over() == []
    dataset = Watched(folder / "reference")
    yield Reference(spec, dataset, dataset.latents())


@pytest.fixture(scope="module")
def disk(world: Path) -> Iterator[Path]:
    """A small disk of its own where this user may mount one, else a folder."""
    folder = world / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "ditmill-test", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
