"""A bad sample fails alone, and its row and its log line say why; a disk that fills up ends a run, which can go on later."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import structlog

from infra.errors import UserError

if TYPE_CHECKING:
    from conftest import Runner

    from pipelines.generate import Outcome
    from pipelines.spec import Spec
from infra.storage import Storage

pytestmark = pytest.mark.ray


class Case(NamedTuple):
    """A prompt and what becomes of it. `mends`: once the judge does no harm any more, it becomes a sample."""

    prompt: bytes
    error_type: str = ""
    stage: str = ""
    says: str = ""
    mends: bool = False
    more: dict[str, str] = {}  # noqa: RUF012

    @property
    def shown(self) -> str:
        return self.prompt.decode(errors="backslashreplace")

    @property
    def record(self) -> bytes:
        more = "".join(f", {json.dumps(key)}: {json.dumps(value)}" for key, value in self.more.items())
        return b'{"prompt": "%s"%s}\n' % (self.prompt, more.encode())


CASES = (
    Case(b"a red circle moving right"),
    Case(b"", "empty_prompt", "encode", "the prompt is empty"),
    Case(b"x" * 100_000, "prompt_too_long", "encode", "100,000 characters; at most 20,000"),
    Case(b"a caf\xe9 at night", "bad_text", "encode", "not valid UTF-8"),
    # a second batch
    Case(b"raise the curtain", "stage_error", "judge", "RuntimeError: the judge stumbled", mends=True),
    Case(b"a dog in the snow", "nan_latents", "sample", "not finite"),
    Case(b"a cat sits in the sun"),
    Case(b"nothing at all", "judge_failed", "judge", "worth is no finite number", mends=True),
    # a third, which kills its worker until each of its samples is alone
    Case(b"kill the lights", "worker_died", "", "the worker process died each time", mends=True),
    Case(b"two boats on the ocean"),
    Case(b"kill the engine", "worker_died", "", "the worker process died each time", mends=True),
    Case(b"a poor drawing of a tree"),
    # and a fourth
    Case(b"a lost frame", "bad_input", "encode", "nowhere.png cannot be read", more={"first_frame": "nowhere.png"}),
    Case(b"a green star"),
    Case(b"raise a flag", "stage_error", "judge", "RuntimeError: the judge stumbled", mends=True),
    Case(b"a bird flying over a river"),
)
BAD = [case for case in CASES if case.error_type]
GOOD = [case for case in CASES if not case.error_type]


class First(NamedTuple):
    """The run of all cases, and what its dataset held after it."""

    root: Path
    spec: Spec
    outcome: Outcome
    samples: dict[str, dict[str, Any]]
    failures: dict[str, dict[str, Any]]
    latents: dict[str, np.ndarray]
    lines: list[dict[str, Any]]


@pytest.fixture(scope="module")
def snow_blind(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny generator with one word's embedding lost: NaN, as a training that overflowed leaves it."""
    from safetensors.numpy import load_file, save_file
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("snow-blind")
    shutil.copytree(tiny_pack / "generator", folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    weights["shared.weight"][tokenizer(" snow", add_special_tokens=False).input_ids] = np.nan
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


def _spec(run: Runner, root: Path, cases: list[Case], generator: str) -> Spec:
    root.parent.mkdir(parents=True, exist_ok=True)
    records = root.with_suffix(".jsonl")
    records.write_bytes(b"".join(case.record for case in cases))
    output = {"uri": str(root), "commit_every": 0.1, "keep_rejected": "latents", "tensors": {"latents": "float32"}}
    return run.spec(root, {"path": str(records)}, generators=[{"model": generator}], output=output)


@pytest.fixture(scope="module")
def first(run: Runner, snow_blind: str, tmp_path_factory: pytest.TempPathFactory) -> First:
    from harness import Watched

    from infra.telemetry import configure

    root = tmp_path_factory.mktemp("first") / "data"
    spec = _spec(run, root, list(CASES), snow_blind)
    said = io.StringIO()
    configure()
    try:
        with contextlib.redirect_stderr(said):
            outcome = run(spec)
    finally:
        structlog.reset_defaults()
    return First(
        root,
        spec,
        outcome,
        {row["prompt"]: row for row in run.rows(root, "samples")},
        {row["prompt"]: row for row in run.rows(root, "failures")},
        Watched(Storage(str(root))).latents(),
        _json_lines(said.getvalue()) + _worker_lines(),
    )


def _worker_lines() -> list[dict[str, Any]]:
    """What the workers of this session have logged."""
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    return [line for file in logs.glob("worker-*.err") for line in _json_lines(file.read_text(errors="replace"))]


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@contextlib.contextmanager
def _mended(world: Path) -> Iterator[None]:
    (world / "mended").touch()
    try:
        yield
    finally:
        (world / "mended").unlink()


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.shown[:30] or "empty")
def test_a_bad_sample_is_a_row_of_failures_and_a_line_of_the_log(case: Case, first: First) -> None:
    assert case.shown not in first.samples
    row = first.failures[case.shown]
    assert (row["error_type"], row["stage"], row["attempt"]) == (case.error_type, case.stage, 1)
    assert case.says in row["error"]
    lines = [line for line in first.lines if line.get("sample_id") == row["sample_id"]]
    assert lines and {line["event"] for line in lines} == {"sample failed"}
    for line in lines:
        said = (line["run_id"], line["stage"], line["error_type"], line["level"])
        assert said == (row["run_id"], case.stage, case.error_type, "warning")


def test_the_others_of_its_batch_are_committed(run: Runner, first: First) -> None:
    assert first.samples.keys() == {case.shown for case in GOOD}
    assert first.failures.keys() == {case.shown for case in BAD}
    assert {prompt for prompt, row in first.samples.items() if row["verdict"] == "rejected"} == {
        "a poor drawing of a tree"
    }
    progress = first.outcome.progress
    assert first.outcome.status == "exhausted"
    assert (progress.accepted, progress.rejected, progress.failed) == (len(GOOD) - 1, 1, len(BAD))
    assert first.outcome.overhead["lost"] + first.outcome.overhead["repeats"] > 0
    run.check(first.root, first.outcome)


def test_failed_samples_stay_failed_until_a_retry(run: Runner, first: First, world: Path) -> None:
    with _mended(world):
        idle = run(first.spec)
        assert idle.progress.launched == 0
        assert len(run.rows(first.root, "failures")) == len(BAD)

        outcome = run(first.spec, retry=("failed",))
    mended = {case.shown for case in BAD if case.mends}
    assert outcome.progress.accepted == len(mended)
    assert {row["prompt"] for row in run.rows(first.root, "samples")} == first.samples.keys() | mended
    attempts = [(row["prompt"], row["error_type"]) for row in run.rows(first.root, "failures") if row["attempt"] == 2]
    assert sorted(attempts) == sorted((case.shown, case.error_type) for case in BAD if not case.mends)
    run.check(first.root, outcome)


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_with_space_again_it_goes_on(
    run: Runner, first: First, world: Path, disk: Path, snow_blind: str
) -> None:
    from harness import Watched

    root = disk / "data"
    spec = _spec(run, root, [*GOOD, Case(b"fill a jar")], snow_blind)
    with pytest.raises(
        UserError, match=r"output\.uri: .*cannot be written \(No space left on device.*; free space"
    ) as told:
        run(spec)
    assert str(root) in str(told.value) and "\n" not in str(told.value)

    (disk / "ballast").unlink(missing_ok=True)
    with _mended(world):
        outcome = run(spec)
    run.check(root, outcome)
    # Nobody failed here, and who stood beside whom was another: bytes are those of the run with the bad ones.
    made = {row["prompt"]: row for row in run.rows(root, "samples")}
    assert made.keys() == {*first.samples, "fill a jar"}
    latents = Watched(Storage(str(root))).latents()
    for prompt, row in first.samples.items():
        assert made[prompt]["sample_id"] == row["sample_id"]
        assert latents[row["sample_id"]].tobytes() == first.latents[row["sample_id"]].tobytes()
        assert [media["sha256"] for media in made[prompt]["media"]] == [media["sha256"] for media in row["media"]]


def test_what_becomes_of_bad_samples_is_documented() -> None:
    from harness import documented

    stages = {name: row[1] for row in documented("Samples that fail") for name in row[0].split(", ")}
    for case in BAD:
        assert case.stage in stages[case.error_type].split(", ") or stages[case.error_type] == "any"
