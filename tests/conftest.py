"""What holds in every test: the environment, set before any test imports torch, ray or prefect, and the tiny pack."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from infra.storage import Storage

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
    HF_HOME=str(REPO / ".pytest_cache" / "huggingface"),  # what the user has fetched must not matter
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_ACCESS_KEY_ID="tests",
    AWS_SECRET_ACCESS_KEY="tests",
    AWS_DEFAULT_REGION="us-east-1",
)
os.environ.setdefault("DITMILL_CACHE", str(_cache_folder()))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server of this session's own, a process with one bucket, `bucket`; credentials are in the environment."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            client = boto3.client("s3", endpoint_url=url)
            for attempt in range(300):
                try:
                    client.create_bucket(Bucket="bucket")
                    break
                except Exception:
                    if attempt == 299 or server.poll() is not None:
                        raise
                    time.sleep(0.1)
            yield url
        finally:
            server.kill()


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty dataset root: a folder, then a prefix on S3."""
    from infra.storage import Storage

    if request.param == "local":
        return Storage(str(tmp_path / "dataset"))
    return Storage(f"s3://bucket/{uuid4().hex}", request.getfixturevalue("s3_endpoint"), allow_http=True)


@pytest.fixture(scope="session")
def tiny_pack() -> Path:
    """Folder of pack://tiny, with one checkpoint folder for each of models.pack.PARTS."""
    from models.pack import pack_folder

    return Path(pack_folder("tiny"))


@pytest.fixture(scope="session")
def tiny_image_to_video(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pack's generator as an image-to-video one: its denoiser also takes the first frame's latents and a mask."""
    from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanTransformer3DModel

    from models.pack.tiny import fill_weights

    pipe = DiffusionPipeline.from_pretrained(tiny_pack / "generator")
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    transformer = WanTransformer3DModel(**{**config, "in_channels": 36, "num_layers": 1})
    fill_weights(transformer, "transformer")
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    folder = tmp_path_factory.mktemp("image-to-video")
    WanImageToVideoPipeline(transformer=transformer, **parts).save_pretrained(folder)
    return str(folder)
