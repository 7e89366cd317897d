"""What holds in every test: the environment, set before any imports torch, ray or prefect; the tiny pack; a Ray session."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from infra.ray_session import Cluster
    from infra.storage import Storage
    from pipelines.commits import Retry
    from pipelines.generate import Outcome, Progress, StopRequest
    from pipelines.spec import Spec

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
    # Said once: Ray's own `init` turns the token on for this process alone, and a cluster of `ray start` without it then
    # cannot reach this process and ends its actors, "all references removed".
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN="the-token-of-the-tests-0123456789abcdef",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_ACCESS_KEY_ID="tests",
    AWS_SECRET_ACCESS_KEY="tests",
    AWS_DEFAULT_REGION="us-east-1",
)
os.environ.setdefault("DITMILL_CACHE", str(_cache_folder()))


ON_CEPH = os.environ.get("DITMILL_TEST_S3") == "ceph"
"""Whether only the tests on S3 run, on a Ceph instead of moto: a real store, which is started for the session."""

CEPH_KEYS = {
    "tests": "tests",
    "AKIASTATIC": "wJalr/XUtnFEMI",
    "AKIAKEPT": "wJalr/XUtnFEMI",
    "AKIADISTINCTIVEKEY": "distinctive/Secret+Key",
}
"""Every key pair of a test: unlike moto, Ceph checks signatures."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ON_CEPH:
        others = [item for item in items if not _is_on_s3(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_on_s3(item)]


def _is_on_s3(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "s3_endpoint" in getattr(item, "fixturenames", ()) or parameters.get("storage") == "s3"


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """URL of an S3 server with one bucket, `bucket`: moto's, or Ceph in `folder`. Credentials are in the environment."""
    if ON_CEPH:
        from infra.ceph import one_node_ceph

        with one_node_ceph(folder, CEPH_KEYS) as store:
            yield store.endpoint_url
        return
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


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server of this session's own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tests/faults/own_judge.py looks at, to know whether to do harm."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def cluster(world: Path) -> Iterator[Cluster]:
    """One Ray session for a module, whose workers find tests/faults/own_judge.py."""
    from infra.ray_session import ray_session
    from pipelines.graph import worker_env

    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(REPO / "tests" / "faults")
    os.environ["DITMILL_TEST_WORLD"] = str(world)
    try:
        with ray_session(None, worker_env(1)) as found:
            yield found
    finally:
        os.environ.clear()
        os.environ.update(before)


class Runner:
    """Takes specs through all but Prefect, the report and the card, on one Ray session."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __call__(
        self,
        spec: Spec,
        stop: StopRequest | None = None,
        report: Callable[[Progress], Any] = lambda _: None,
        retry: tuple[Retry, ...] = (),
    ) -> Outcome:
        from infra.storage import writing
        from pipelines.generate import StopRequest
        from pipelines.resolve import resolve_spec
        from pipelines.run import clean_up, expand, make_samples, open_dataset, sample_groups

        found = resolve_spec(spec)
        open_dataset(found)
        groups = lambda: sample_groups(found, self._cluster)  # noqa: E731
        try:
            with writing(found.storage.root):
                enumeration, _ = expand(found, groups)
                outcome = make_samples(found, enumeration, groups, stop or StopRequest(), report, retry=retry)
        except BaseException:
            with suppress(OSError):  # the disk may be full
                clean_up(found)
            raise
        clean_up(found)
        return outcome

    @staticmethod
    def spec(root: Path, prompts: dict[str, Any], **keys: Any) -> Spec:
        """A spec of pack://tiny and the test's own judge that is quick on a CPU, with keys replaced by `keys`."""
        from pipelines.spec import parse_spec

        spec: dict[str, Any] = {
            "prompts": {"near_duplicates": "ignore", **prompts},
            "generators": [{"model": "pack://tiny"}],
            "layout": {"batch_size": 4},
            "sampler": {"num_inference_steps": 2},
            "judge": {"backend": "call", "call": "own_judge:score", "version": "1", "thresholds": {"worth": 0.5}},
            "score": {"reject_duplicates": False},
            "caption": None,
            "output": {"uri": str(root), "commit_every": 0.1},
        }
        return parse_spec(spec | keys)

    @staticmethod
    def rows(root: Path, table: str) -> list[dict[str, Any]]:
        """What a table of the dataset holds."""
        from infra.storage import Storage
        from infra.tables import Table

        return Table(Storage(str(root)), table).read().to_pylist()

    @classmethod
    def check(cls, root: Path, outcome: Outcome) -> None:
        """All promises hold, and all of what actors held is in a row's cost or in the run's overhead."""
        from infra.storage import Storage
        from pipelines.verify import verify

        assert list(map(str, verify(Storage(str(root))))) == []
        run = max((row for row in cls.rows(root, "runs") if row["event"] == "ended"), key=lambda row: row["created_at"])
        assert run["status"] == outcome.status
        assert run["allocated_accelerator_seconds"] == outcome.allocated
        rows = [row for table in ("samples", "failures") for row in cls.rows(root, table)]
        spent = sum(
            cost["accelerator_seconds"] for row in rows if row["run_id"] == run["run_id"] for cost in row["cost"]
        )
        overhead = json.loads(run["overhead_json"])
        assert spent + sum(overhead.values()) == pytest.approx(outcome.allocated, rel=0.02)
        assert min(overhead.values()) >= 0


@pytest.fixture(scope="module")
def run(cluster: Cluster) -> Runner:
    return Runner(cluster)
