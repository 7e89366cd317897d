"""What holds in every test: the environment, set before any test imports torch, ray or prefect, and the tiny pack."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


def _cache_folder() -> Path:
    """A cache of the tests' own, so that nobody's packs are touched; another one for each state of the pack's code."""
    sources = [*sorted((REPO / "models/pack").rglob("*.py")), REPO / "requirements.lock"]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return REPO / ".pytest_cache" / f"ditmill-{state}"


os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_CBWR="AUTO,STRICT",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    PREFECT_LOGGING_LEVEL="WARNING",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    AWS_EC2_METADATA_DISABLED="true",
)
os.environ.setdefault("DITMILL_CACHE", str(_cache_folder()))


@pytest.fixture(scope="session")
def tiny_pack() -> Path:
    """Folder of pack://tiny, with one checkpoint folder for each of models.pack.PARTS."""
    from models.pack import pack_folder

    return Path(pack_folder("tiny"))
