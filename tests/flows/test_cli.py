"""The command line without a run: help, plans, and mistakes that are one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.exporters import FORMATS

REPO = Path(__file__).parents[2]
DATA = REPO / "tests" / "data"

COMMANDS = (
    "make", "init", "plan", "run", "status", "stop", "report", "verify", "regenerate", "annotate", "release", "export",
    "distill", "tune", "models", "vacuum", "bench",
)  # fmt: skip


def ditmill(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPO), "TERM": "dumb"}
    return subprocess.run(command, cwd=cwd or REPO, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "v1", tmp_path / "v1")
    return tmp_path / "v1"


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    probe = (
        "import resource, sys\n"
        "from flows.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'prefect', 'diffusers', 'transformers', 'pyarrow', 'pydantic'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('\\n', sorted(heavy), used.ru_utime + used.ru_stime)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True, check=True)
    heavy, _, seconds = done.stdout.splitlines()[-1].strip().rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 0.5  # of CPU: the machine may be busy


def test_help_names_every_command() -> None:
    said = ditmill("--help").stdout
    for command in COMMANDS:
        assert command in said


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str) -> None:
    done = ditmill(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_export_help_names_every_format() -> None:
    said = ditmill("export", "--help").stdout
    for name in FORMATS:
        assert f"{name}: " in said


def test_init_writes_a_spec_that_plans(tmp_path: Path) -> None:
    assert ditmill("init", cwd=tmp_path).returncode == 0
    done = ditmill("plan", "ditmill.yaml", "--no-calibrate", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["new"] == plan["planned"] == 3
    assert plan["licences"]["pack://shapes"]["may_train"] == "yes"
    assert [stage for group in plan["groups"] for stage in group["stages"]] == [
        "encode", "sample", "decode", "score", "judge", "caption", "write",
    ]  # fmt: skip
    again = ditmill("init", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_plan_estimates_from_a_calibration_and_writes_nothing(tmp_path: Path) -> None:
    ditmill("init", cwd=tmp_path)
    settings = [
        "--set",
        "sampler.num_inference_steps=6",
        "--set",
        "layout.batch_size=2",
        "--set",
        "caption.max_new_tokens=4",
    ]
    done = ditmill("plan", "ditmill.yaml", "--json", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    estimate = json.loads(done.stdout)["estimate"]
    assert estimate["nfe_each"] == 12  # six steps, two branches of guidance
    assert estimate["nfe"] == 36
    assert estimate["seconds"] > 0 and estimate["nbytes"] > 0
    assert estimate["stage_seconds"].keys() == {"encode", "sample", "decode", "score", "judge", "caption", "write"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ditmill.yaml"]


def test_init_writes_a_json_schema(tmp_path: Path) -> None:
    assert ditmill("init", "--schema", str(tmp_path / "schema.json")).returncode == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert schema["additionalProperties"] is False
    assert {"prompts", "generators", "sampler"} <= schema["properties"].keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["plan", "s.yaml", "--set", "layout.batchsize=1"], "layout.batch_size"),
        (["plan", "s.yaml", "--set", "layout.batch_size=many"], "layout.batch_size"),
        (["plan", "s.yaml", "--set", "nonsense"], "--set"),
        (["plan", "s.yaml", "--set", "generators.0.model=/nowhere/at/all"], "generators.model"),
        (["plan", "s.yaml", "--set", "judge.rubric=nowhere.yaml"], "judge.rubric"),
        (["plan", "s.yaml", "--set", "judge.thresholds={beauty: 1}"], "judge.thresholds"),
        (["plan", "s.yaml", "--set", "budget.deadline=soon"], "budget.deadline"),
        (["plan", "s.yaml", "--set", "sampler.plan=auto"], "sampler.plan"),
        (["tune", "s.yaml"], "--budget"),
        (["tune", "s.yaml", "--budget", "quality=1"], "--budget"),
        (["plan", "s.yaml", "--set", "layout.parallel={vae: 2}"], "vae"),
        (["plan", "s.yaml", "--set", "layout.parallel={ulysses: 64}"], "64 ranks for"),
        (["plan", "s.yaml", "--set", "buckets=[{height: 33, width: 64}]"], "buckets"),
        (["plan", "s.yaml", "--set", "recipe=curate"], "recipe"),
        (["verify", "/nowhere/at/all"], "dataset.json"),
        (["annotate", "V1"], "--judge"),
        (["annotate", "V1", "--labels", "nowhere.csv"], "nowhere.csv"),
        (["annotate", "V1", "--withdraw", "f" * 32], "f" * 32),
        (["release", "V1", "r", "--where", "no such thing"], "where"),
        (["release", "V1", "r", "--pack", "many"], "--pack"),
        (["release", "V1", "r", "--cap", "tags"], "--cap"),
        (["release", "V1", "r", "--near-duplicates", "40"], "near_duplicates.hash"),
        (["release", "V1", "r", "--against", "before"], "against needs near_duplicates"),
        (["release", "V1", "r", "--rules", "nowhere.yaml"], "--rules"),
        (["export", "V1", "--release", "r", "--to", "nonsense"], "there are: fastvideo-t2v, "),
        (["export", "V1", "--release", "r", "--to", "fastvideo-t2v"], "release 'r'"),
        (["regenerate", "V1", "0" * 32], "0" * 32),
        (["bench", "nothing"], "overhead"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path, v1: Path) -> None:
    (tmp_path / "s.yaml").write_text("prompts: {inline: [a red circle]}\noutput: {uri: out}\n")
    done = ditmill(*(str(v1) if word == "V1" else word for word in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_verify_exits_with_1_and_a_list_where_a_promise_is_broken(v1: Path) -> None:
    assert ditmill("verify", str(v1)).returncode == 0
    next((v1 / "media").rglob("*.tar")).unlink()
    done = ditmill("verify", str(v1), "--json")
    assert done.returncode == 1
    assert "shard_missing" in {finding["kind"] for finding in json.loads(done.stdout)}


def test_status_stop_report_and_vacuum_on_a_dataset(v1: Path) -> None:
    status = json.loads(ditmill("status", str(v1), "--json").stdout)
    assert status["samples"] > 0 and status["live"] == []
    assert "no run is live" in ditmill("stop", str(v1)).stdout
    assert ditmill("report", str(v1)).returncode == 0
    assert (v1 / "report" / "index.html").stat().st_size > 10_000
    assert (v1 / "README.md").read_text().startswith("---\n")
    assert ditmill("vacuum", str(v1), "--dry-run").returncode == 0


def test_models_lists_the_families() -> None:
    rows = json.loads(ditmill("models", "--json").stdout)
    assert {"WanPipeline", "FluxPipeline", "QwenImagePipeline"} <= {row["pipeline"] for row in rows}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks for a file system that nobody may write to")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "/proc/x.yaml"], "/proc/x.yaml: cannot be written"),
        (["make", "a cat", "-n", "1", "--model", "pack://tiny", "--out", "/proc/x"], "output.uri: /proc/x cannot be"),
        (
            ["export", "DATASET", "--release", "r1", "--to", "webdataset", "--out", "/proc/x"],
            "--out: /proc/x cannot be",
        ),
        (["bench", "world", "--sheet", "/proc/x.png"], "--sheet: /proc/x.png cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_place_that_cannot_be_written_is_told_in_a_line(v1: Path, arguments: list[str], said: str) -> None:
    if "DATASET" in arguments:
        assert ditmill("release", str(v1), "r1").returncode == 0
    done = ditmill(*(str(v1) if each == "DATASET" else each for each in arguments))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert said in done.stderr.splitlines()[-1]
