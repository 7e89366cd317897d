"""Makes `harness` importable for the tests beside it, and one undisturbed run that all compare with."""

from __future__ import annotations

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
