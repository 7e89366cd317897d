"""Models reach the nodes that lack them, once each, whole, and nothing else does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from infra.storage import Storage
from infra.tables import Table
from models.language import LanguageRef
from models.loading import GeneratorRef, TeacherRef
from models.multimodal import MultimodalRef
from models.plan import SamplerPlan
from models.source import files_of
from pipelines.verify import verify
from stages.batch import WorldFault
from stages.caption import CaptionMedia
from stages.decode import DecodeLatents
from stages.delivery import CHUNK, Delivered, Delivery, Library, Model, inside, moved, path_here, paths_of
from stages.expand import ExpandPrompts
from stages.group import InGroup
from stages.read import DecodeStored
from stages.sample import SampleLatents
from stages.score import ScoreMedia

REPO = Path(__file__).parents[2]
PLAN = SamplerPlan(num_inference_steps=2)
REFS = (GeneratorRef("/models/wan", (("/models/a.safetensors", 0.5), ("/models/b", 1.0))), GeneratorRef("/models/ltx"))
PLACES = {"/models/wan": "/w", "/models/a.safetensors": "/a", "/models/b": "/b", "/models/ltx": "/l"}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A checkpoint folder on the driver's machine, of three chunks of 1000 bytes and some small files."""
    folder = tmp_path / "driver" / "wan"
    for name, data in {
        "model_index.json": b'{"_class_name": "WanPipeline", "transformer": ["diffusers", "T"]}',
        "transformer/diffusion.safetensors": bytes(range(250)) * 10,
        "transformer/config.json": b"",
        "transformer/code.py": b"raise SystemExit",
        "README.md": b"a model",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Model.at(str(folder))


@pytest.fixture
def elsewhere(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The same, as another machine with a cache of its own sees it: nothing is at the model's path."""
    monkeypatch.setenv("DITMILL_CACHE", str(tmp_path / "node"))
    return replace(model, path=str(tmp_path / "not here" / "wan"))


def _from(driver: Model, asked: list[str] | None = None) -> Callable[[Model], Iterator[tuple[str, np.ndarray]]]:
    """What a library on the driver's machine answers, and which files it was asked for."""
    library = Library((driver,))

    def pieces(model: Model) -> Iterator[tuple[str, np.ndarray]]:
        for name, size in model.files:
            if asked is not None:
                asked.append(name)
            for offset in range(0, max(1, size), 1000):
                yield name, library.read(driver.path, name, offset, min(1000, size - offset))

    return pieces


def _refused(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    raise AssertionError("nothing was to be fetched")


def test_models_are_found_in_stages_and_stages_of_stages() -> None:
    sample = SampleLatents(REFS, PLAN, 2)
    assert paths_of(sample) == list(PLACES)
    assert paths_of((ScoreMedia(), InGroup(sample, 2), CaptionMedia(MultimodalRef("/models/judge")))) == [
        *PLACES,
        "/models/judge",
    ]
    assert paths_of(ExpandPrompts(LanguageRef("/models/qwen"), "{prompt}")) == ["/models/qwen"]


def test_models_move_and_names_of_models_stay() -> None:
    wan, ltx = moved(SampleLatents(REFS, PLAN, 2), PLACES).generators
    assert (wan.path, wan.adapters, ltx.path) == ("/w", (("/a", 0.5), ("/b", 1.0)), "/l")
    taught = SampleLatents((replace(REFS[0], teacher=TeacherRef("/models/ltx", "/models/ltx", "", 1, 2.0)),), PLAN, 2)
    assert paths_of(taught)[-1] == "/models/ltx"
    assert moved(taught, PLACES).generators[0].teacher == TeacherRef("/l", "/models/ltx", "", 1, 2.0)
    # The label goes into rows: the model as the spec names it, which may be a path as well.
    caption = moved(CaptionMedia(MultimodalRef("/models/wan"), label="/models/wan"), PLACES)
    assert (caption.model.path, caption.label) == ("/w", "/models/wan")
    score = ScoreMedia()
    assert moved(score, PLACES) is score


def test_the_innermost_stage_finds_its_models_in_its_own_process() -> None:
    delivery = Delivery({path: Model(path, "0", ()) for path in PLACES}, library=None)
    sample, decode = SampleLatents(REFS, PLAN, 2), DecodeLatents(REFS, PLAN, 2)
    group = delivery.of(InGroup(sample, 2))
    assert isinstance(group, InGroup) and group.ranks == 2  # each rank for itself
    assert isinstance(group.stage, Delivered) and group.stage.stage is sample and group.name == "sample"
    stored = delivery.of(DecodeStored(decode))
    assert isinstance(stored, DecodeStored) and isinstance(stored.stage, Delivered)  # which it may never call
    score = ScoreMedia()
    assert delivery.of(score) is score


def test_a_model_that_is_here_is_used_as_it_is(model: Model) -> None:
    assert path_here(model, _refused) == model.path


def test_a_model_that_is_not_here_is_fetched_once_without_what_nobody_loads(model: Model, elsewhere: Model) -> None:
    asked: list[str] = []
    place = path_here(elsewhere, _from(model, asked))
    names = ["model_index.json", "transformer/config.json", "transformer/diffusion.safetensors"]
    assert asked == list(files_of(place)) == names
    assert sum(path.is_file() for path in Path(place).rglob("*")) == len(names)
    for name in names:
        assert Path(place, name).read_bytes() == Path(model.path, name).read_bytes()
    assert path_here(elsewhere, _refused) == place


def test_other_bytes_at_the_same_path_are_another_model(model: Model, elsewhere: Model) -> None:
    """Fine-tuned weights have the names and sizes of those that they were made of."""
    other = Path(elsewhere.path)
    shutil.copytree(model.path, other)
    (other / "transformer/diffusion.safetensors").write_bytes(bytes(2500))
    assert path_here(elsewhere, _from(model)) != str(other)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.fp16.safetensors"])
def test_a_file_arrives_under_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITMILL_CACHE", str(tmp_path / "node"))
    (tmp_path / name).write_bytes(b"weights")
    driver = Model.at(str(tmp_path / name))
    elsewhere = replace(driver, path=str(tmp_path / "not here" / name))
    place = Path(path_here(elsewhere, _from(driver)))
    assert (place.name, place.read_bytes()) == (name, b"weights")
    assert path_here(elsewhere, _refused) == str(place)


def test_of_several_at_once_one_fetches(model: Model, elsewhere: Model) -> None:
    asked: list[str] = []

    def slowly(wanted: Model) -> Iterator[tuple[str, np.ndarray]]:
        time.sleep(0.2)
        yield from _from(model, asked)(wanted)

    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(lambda _: path_here(elsewhere, slowly), range(4)))
    assert len(set(places)) == 1
    assert len(asked) == len(model.files)


def test_a_fetch_that_breaks_off_leaves_nothing_and_the_next_begins_anew(model: Model, elsewhere: Model) -> None:
    def broken(wanted: Model) -> Iterator[tuple[str, np.ndarray]]:
        yield "model_index.json", np.zeros(3, np.uint8)
        raise ConnectionError("the library is gone\nand more of it")

    with pytest.raises(WorldFault, match=r"wan could not be fetched from .* \(ConnectionError: the library is gone\)$"):
        path_here(elsewhere, broken)
    cache = Path(os.environ["DITMILL_CACHE"]) / "models"
    assert [path.name for path in cache.iterdir()] == [f"{model.sha256}.lock"]
    (cache / f".{model.sha256}" / "transformer").mkdir(parents=True)  # as a process leaves it that was killed
    (cache / f".{model.sha256}" / "transformer" / "diffusion.safetensors").write_bytes(b"half")
    place = Path(path_here(elsewhere, _from(model)))
    (place / "transformer" / "diffusion.safetensors").unlink()
    assert path_here(elsewhere, _from(model)) == str(place)
    assert len(files_of(str(place))) == 3


def test_a_model_that_changed_meanwhile_is_not_taken(model: Model, elsewhere: Model) -> None:
    Path(model.path, "transformer/diffusion.safetensors").write_bytes(bytes(2500))
    with pytest.raises(WorldFault, match="it has changed since the run began"):
        path_here(elsewhere, _from(model))
    assert not Path(os.environ["DITMILL_CACHE"], "models", model.sha256).exists()


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    elsewhere: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(WorldFault, match=r"bytes are needed and 10 free"):
        path_here(elsewhere, _refused)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WorldFault, match="no name within its folder"):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/..b.json") == tmp_path / "a" / "..b.json"


@pytest.mark.parametrize("name", ["README.md", "transformer/code.py", "../wan/model_index.json", "/etc/passwd"])
def test_a_library_reads_what_loaders_read_and_nothing_else(name: str, model: Model) -> None:
    library = Library((model,))
    with pytest.raises(PermissionError):
        library.read(model.path, name, 0, 10)
    assert library.read(model.path, "model_index.json", 2, 11).tobytes() == b"_class_name"


HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(sys.argv[1]), "include_dashboard": False})
print(cluster.address, cluster.head_node.node_id, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def _two_machines(cpus: tuple[int, int], *hidden: Path) -> Iterator[tuple[str, str, int]]:
    """A cluster of two raylets. The second's processes find the folders `hidden` empty.

    Its address, the id of the first node, and the pid of a process of the second.
    """
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")
    mounts = " && ".join(f"mount -t tmpfs tmpfs '{folder}'" for folder in hidden)
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, str(cpus[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as head:
        assert head.stdout is not None
        address, node = head.stdout.readline().split()
        ray = Path(sys.executable).with_name("ray")
        start = f"{mounts} && exec '{ray}' start --address={address} --num-cpus={cpus[1]} --block --disable-usage-stats"
        second = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", start],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait_for_nodes(address, 2)
            yield address, node, second.pid
        finally:
            os.killpg(second.pid, signal.SIGTERM)
            second.wait(60)
            head.communicate(timeout=60)


def _wait_for_nodes(address: str, count: int) -> None:
    from ray._raylet import GcsClient

    client = GcsClient(address=address)
    for _ in range(600):
        if sum(node.state == 0 for node in client.get_all_node_info().values()) == count:
            return
        time.sleep(0.1)
    raise AssertionError("the second node did not come")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("cpus", "samplers", "parallel"),
    [
        pytest.param((0, 3), 2, {}, id="samplers", marks=pytest.mark.soak),
        pytest.param((2, 3), 1, {"cfg": 2, "ulysses": 2}, id="a group over both nodes"),
    ],
)
def test_a_node_without_the_model_fetches_it_once_for_all_of_its_samplers(
    cpus: tuple[int, int], samplers: int, parallel: dict[str, int], tmp_path: Path, tiny_pack: Path
) -> None:
    """Five processes, of which one judges, fill both nodes: ranks are on both, two of them at least on the second."""
    folder, cache = tmp_path / "models" / "wan", tmp_path / "cache"
    shutil.copytree(tiny_pack / "generator", folder)
    beside = np.random.default_rng(0).integers(0, 256, CHUNK + 7, dtype=np.uint8)  # a file of several answers
    save_file({"beside": beside}, folder / "vae" / "beside.safetensors")
    cache.mkdir()
    with _two_machines(cpus, folder.parent, cache) as (address, first, second):
        done = _run(
            tmp_path,
            prompts={"inline": [f"thing {at}" for at in range(12)], "near_duplicates": "ignore"},
            generators=[{"model": str(folder)}],
            layout={"batch_size": 2, "parallel": parallel},
            compute={"ray_address": address, "actors": {"sample": samplers}},
        )
        kept = Path(f"/proc/{second}/root{cache}/models")
        fetched = [path for path in kept.rglob("*") if path.is_file() and path.suffix != ".lock"]
        nbytes = sum(path.stat().st_size for path in fetched)
    assert not (cache / "models").exists()  # the driver's machine has the model where it is
    assert nbytes == sum(path.stat().st_size for path in files_of(str(folder)).values())
    (line,) = set(re.findall(r'\{.*"event": "model fetched".*\}', done.stderr))
    assert json.loads(line)["nbytes"] == nbytes
    result = json.loads(done.stdout)
    assert result["status"] == "exhausted" and result["failed"] == 0
    storage = Storage(str(tmp_path / "data"))
    assert list(map(str, verify(storage))) == []
    (run,) = (row for row in Table(storage, "runs").read().to_pylist() if row["event"] == "ended")
    devices = {where for actor in json.loads(run["extra_json"])["actors"] for where in actor["devices"].split(",")}
    nodes = {where.partition("/")[0] for where in devices if where}
    assert (len(nodes), first in nodes) == ((2, True) if cpus[0] else (1, False))


def _run(folder: Path, **keys: Any) -> subprocess.CompletedProcess[str]:
    spec = {
        "name": "delivery",
        "sampler": {"num_inference_steps": 4},
        "judge": {"backend": "none"},
        "score": {"reject_duplicates": False, "reject_static": False},
        "caption": None,
        "output": {"uri": str(folder / "data"), "commit_every": 0.5},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | keys), encoding="utf-8")
    env = {**os.environ, "DITMILL_CACHE": str(folder / "cache"), "DITMILL_LOG_LEVEL": "INFO"}
    command = [sys.executable, "-m", "flows.cli", "run", str(path), "--json"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
