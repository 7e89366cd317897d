"""Makes `harness` and `s3_proxy` importable for the tests beside them; a run that nobody disturbed, a disk that can be
filled, and S3 behind a bad network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from harness import Reference
    from s3_proxy import Faults

    from infra.storage import Storage


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_pack: Path) -> Iterator[Reference]:
    """A run of the killed runs' spec that nobody disturbed."""
    from harness import Launch, Reference, Watched, kill_spec

    from infra.storage import Storage

    folder = tmp_path_factory.mktemp("reference")
    spec = kill_spec(folder / "reference.yaml")
    launch = Launch(["run", str(spec)], folder / "log")
    assert launch.wait() == 0, launch.said()
    assert launch.left_over() == []
    dataset = Watched(Storage(str(folder / "reference")))
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


@pytest.fixture
def faults() -> Faults:
    """What befalls the requests of `bad_s3`: nothing, until a test says so."""
    from s3_proxy import Faults

    return Faults(stall=2)


@pytest.fixture
def bad_s3(s3_endpoint: str, faults: Faults) -> Iterator[Storage]:
    """An empty dataset root on S3 behind a proxy that injects `faults`; its clients wait a second for an answer."""
    from s3_proxy import s3_proxy

    from infra.storage import Storage

    with s3_proxy(s3_endpoint, faults) as url:
        yield Storage(f"s3://bucket/{uuid4().hex}", url, allow_http=True, timeout=1)
