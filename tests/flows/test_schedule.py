"""Deployments through a real Prefect server, on Postgres where it is installed, and a real worker process."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from infra.storage import Storage
from infra.tables import Table
from pipelines.verify import verify

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect"]
DITMILL = [sys.executable, "-m", "flows.cli"]
POOL = "mill"

BLOCK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
told = {"event": "by the block", "name": "guarded", "body": "{{body}}"}
CustomWebhookNotificationBlock(name="team", url=sys.argv[1], json_data=told).save("team")
"""
"""A notification block on the server, that tells the webhook."""


@dataclass(frozen=True)
class Team:
    """A Prefect server, a worker on its pool, and what a webhook was told."""

    url: str
    env: dict[str, str]
    worker: subprocess.Popen[bytes]
    told: list[dict[str, Any]]

    def ditmill(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*DITMILL, *arguments], cwd=REPO, env=self.env, capture_output=True, text=True, timeout=120
        )

    def post(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.url}/{path}", json=body, timeout=30).raise_for_status()
        return answer.json() if answer.content else None

    def flow_runs(self, deployment: str) -> list[dict[str, Any]]:
        """Those that have begun, oldest tick first."""
        found = self.post(
            "flow_runs/filter", deployments={"id": {"any_": [deployment]}}, sort="EXPECTED_START_TIME_ASC"
        )
        return [run for run in found if run["run_count"]]

    def engine(self) -> psutil.Process | None:
        """The process of the flow run that is under way."""
        for child in psutil.Process(self.worker.pid).children(recursive=True):
            try:
                if "prefect.engine" in child.cmdline():
                    return child
            except psutil.Error:
                continue
        return None


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, webhook: Callable[[], Any]) -> Iterator[Team]:
    home = tmp_path_factory.mktemp("team")
    with ExitStack() as stack:
        hook, told = stack.enter_context(webhook())
        port = _free_port()
        url = f"http://127.0.0.1:{port}/api"
        env = {
            **os.environ,
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": url,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_LOGGING_LEVEL": "INFO",
            "TEAM_HOOK": hook,
            **stack.enter_context(_postgres()),
        }
        log = stack.enter_context((home / "prefect.log").open("wb"))
        serving = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(_process(serving, env, log))
        _until(lambda: _answers(url), 120, "the Prefect server did not start")
        subprocess.run(
            [*PREFECT, "work-pool", "create", POOL, "--type", "process"], env=env, check=True, capture_output=True
        )
        worker = stack.enter_context(_process([*PREFECT, "worker", "start", "--pool", POOL], env, log))
        yield Team(url, env, worker, told)


@contextmanager
def _process(
    command: list[str], env: dict[str, str], log: Any, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=cwd) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


@contextmanager
def _postgres() -> Iterator[dict[str, str]]:
    """Environment of a server on a Postgres of its own; of one on SQLite where Postgres is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))
    if initdb is None:
        yield {}
        return
    # Postgres runs as nobody's root: where the tests do, it is given a user and a folder of that user's.
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(
        subprocess.run(["mktemp", "-d"], user=user, capture_output=True, text=True, check=True).stdout.strip()
    )
    port = _free_port()
    bin_folder = Path(initdb).resolve().parent
    made = [str(bin_folder / "initdb"), "-D", str(folder / "data"), "-U", "prefect", "--auth=trust", "--no-sync"]
    subprocess.run(made, user=user, check=True, capture_output=True, cwd="/")
    arguments = ["-D", str(folder / "data"), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
    with subprocess.Popen(
        [str(bin_folder / "postgres"), *arguments],
        user=user,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            ready = [str(bin_folder / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
            _until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 60, "Postgres did not start")
            yield {"PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"}
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


def test_ticks_that_are_killed_and_preempted_go_on_and_the_next_one_makes_new_samples(
    team: Team, tmp_path: Path
) -> None:
    root, planned = tmp_path / "data", 160
    spec = _spec(tmp_path, "nightly", samples_per_prompt=planned // 2, schedule={"every": "90s"})
    deployed = team.ditmill("deploy", spec, "--work-pool", POOL, "--json")
    assert deployed.returncode == 0, deployed.stderr
    deployment = json.loads(deployed.stdout)["deployment_id"]
    seen = 0
    for end in (signal.SIGKILL, signal.SIGTERM):
        # Early in a tick: one that has handed out all of its samples ends as if nobody had asked it to.
        _until(lambda seen=seen: seen < (rows := _rows(root)) and 0 < rows % planned <= planned // 4, 240, "no tick")  # type: ignore[misc]
        seen = _rows(root)
        engine = team.engine()
        assert engine is not None
        engine.send_signal(end)
        engine.wait(120)
    first = min(_ticks(root))
    _until(lambda: first in _ended(root) and len(_ended(root)) >= 2, 300, "the first tick and another did not end")
    team.post(f"deployments/{deployment}/pause_deployment")
    _until(lambda: team.engine() is None, 180, "a tick did not end")

    storage = Storage(str(root))
    assert list(map(str, verify(storage))) == []
    rows = Table(storage, "samples").read(["sample_id", "run_id"]).to_pylist()
    assert len({row["sample_id"] for row in rows}) == len(rows)
    runs = {row["run_id"]: json.loads(row["spec_json"])["schedule"]["tick"] for row in _runs(root)}
    ticks = sorted(set(runs.values()))
    assert len(ticks) >= 2
    by_tick = {tick: [row for row in rows if runs[row["run_id"]] == tick] for tick in ticks}
    assert [len(by_tick[tick]) for tick in ticks] == [planned] * len(ticks)
    assert all(datetime.fromisoformat(tick).timestamp() % 90 == 0 for tick in ticks)
    # The first was killed and has rows of two runs or three; one was told to end, and another run went on with its tick.
    assert len({row["run_id"] for row in by_tick[first]}) >= 2
    ended = {row["run_id"]: row for row in _runs(root) if row["event"] == "ended"}
    (told,) = (row for row in ended.values() if row["status"] == "stopped")
    assert len({row["run_id"] for row in by_tick[runs[told["run_id"]]]}) >= 2
    began = {row["run_id"]: row["created_at"] for row in _runs(root) if row["event"] == "started"}
    spans = sorted((began[run_id], row["created_at"]) for run_id, row in ended.items())
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))  # one tick at a time
    assert {run["state"]["type"] for run in team.flow_runs(deployment)} == {"COMPLETED"}
    events = [event["event"] for event in team.told if event["name"] == "nightly"]
    assert events[0] == "failed" and events.count("finished") >= len(ticks)


def test_a_breach_of_the_guards_pauses_a_served_deployment_and_is_told(team: Team, tmp_path: Path) -> None:
    guards = {"min_accepted": 0.5, "window": 4}
    subprocess.run([sys.executable, "-c", BLOCK, team.env["TEAM_HOOK"]], env=team.env, check=True, capture_output=True)
    notify = {"webhook": "$TEAM_HOOK", "block": "custom-webhook/team"}
    keys = {"samples_per_prompt": 20, "guards": guards, "score": {"min_sharpness": 1e12}, "notify": notify}
    spec = _spec(tmp_path, "guarded", **keys)
    named = f"{team.url}/deployments/name/synthesize/guarded"
    serving = [*DITMILL, "deploy", spec, "--serve", "--cron", "0 3 1 1 *"]
    with (tmp_path / "served.log").open("wb") as log, _process(serving, team.env, log, cwd=REPO) as served:
        _until(lambda: served.poll() is not None or httpx.get(named).status_code == 200, 60, "it was not deployed")
        deployment = httpx.get(named).raise_for_status().json()["id"]
        team.post(f"deployments/{deployment}/create_flow_run")
        _until(lambda: any(run["state"]["type"] == "FAILED" for run in team.flow_runs(deployment)), 180, "no end")
    assert httpx.get(named).json()["paused"] is True
    told = [event for event in team.told if event["name"] == "guarded"]
    assert [event["event"] for event in told] == ["paused", "by the block"]
    assert "guards.min_accepted: 0 of the last 4" in told[1]["body"]
    assert told[0]["why"].startswith("guards.min_accepted: 0 of the last 4")
    storage = Storage(str(tmp_path / "data"))
    assert list(map(str, verify(storage))) == []
    assert 4 <= _rows(tmp_path / "data") < 40


def test_deploy_says_in_one_line_what_is_missing(team: Team, tmp_path: Path) -> None:
    spec = _spec(tmp_path, "mistaken")
    for arguments, said in (
        (["--work-pool", "nowhere"], "--work-pool: there is no pool nowhere"),
        (["--work-pool", POOL, "--image", "ditmill:1"], "takes no image"),
        (["--work-pool", POOL, "--cron", "61 3 * * *"], "schedule.cron: '61 3 * * *'"),
        (["--work-pool", POOL, "--set", "notify.webhook=$NO_HOOK"], "notify.webhook: NO_HOOK is not set"),
        (["--work-pool", POOL, "--set", "notify.block=slack-webhook/nobody"], "notify.block"),
    ):
        done = team.ditmill("deploy", spec, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr


def _spec(folder: Path, name: str, **keys: Any) -> str:
    spec = {
        "name": name,
        "prompts": {"inline": ["a red circle", "a blue square"], "near_duplicates": "ignore"},
        "generators": [{"model": "pack://tiny"}],
        "layout": {"batch_size": 2},
        "sampler": {"num_inference_steps": 10},
        "judge": {"backend": "none"},
        "score": {"reject_duplicates": False, "reject_static": False},
        "caption": None,
        "notify": {"webhook": "$TEAM_HOOK"},
        "output": {"uri": str(folder / "data"), "commit_every": 0.1},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | keys), encoding="utf-8")
    return str(path)


def _rows(root: Path) -> int:
    return int(Table(Storage(str(root)), "samples").dataset().count_rows()) if (root / "samples").exists() else 0


def _runs(root: Path) -> list[dict[str, Any]]:
    return Table(Storage(str(root)), "runs").read(["run_id", "event", "status", "spec_json", "created_at"]).to_pylist()


def _ticks(root: Path) -> set[str]:
    return {json.loads(row["spec_json"])["schedule"]["tick"] for row in _runs(root)}


def _ended(root: Path) -> set[str]:
    """Ticks that are whole."""
    whole = [row for row in _runs(root) if row["status"] == "exhausted"]
    return {json.loads(row["spec_json"])["schedule"]["tick"] for row in whole}


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _until(there: Callable[[], Any], seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, otherwise
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
