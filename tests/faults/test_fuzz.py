"""Whatever a user's file holds, it is taken or it ends in a line: specs, --set, rubrics, records and labels."""

from __future__ import annotations

import json
import resource
import secrets
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hostile import ASSIGNMENTS, FULL, LABEL_FILES, RECORD_FILES, REPO, RUBRIC_FILES, mutations, yaml_files
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from infra.errors import UserError
from infra.schema import PROMPTS
from infra.storage import Storage
from pipelines.annotate import label
from pipelines.records import resolve_prompts
from pipelines.resolve import storage_of
from pipelines.sampling import sampler_plan
from pipelines.spec import Spec, absolute_paths, load_spec, parse_spec
from stages.rubric import check_thresholds, load_rubric

FEW = 250
"""Examples of each kind in `make test`."""

SOAK = 10_000
"""Examples of all kinds together in `make soak`."""

SLOWEST = timedelta(seconds=20)
MOST_MEMORY = 700 << 20

# ---- what each kind is checked by


def one_line(error: UserError, lines: int = 1) -> None:
    message = str(error)
    assert message.strip() and len(message.splitlines()) <= lines and len(message) < 20_000, message[:2000]


def check_spec(spec: Spec) -> None:
    """What is looked up of a spec before any model, and that what `runs` keeps of it is the same spec."""
    text = spec.model_dump_json()
    assert parse_spec(json.loads(text)).model_dump_json() == text
    try:
        spec = absolute_paths(spec)
        storage_of(spec)
        sampler_plan(spec.sampler)
        check_thresholds(load_rubric(spec.judge.rubric), spec.judge.bars)
    except UserError as error:
        one_line(error, 40)


def spec_values(folder: Path, data: dict[str, Any], assignments: list[str] | None = None) -> bool:
    try:
        spec = parse_spec(data, assignments)
    except UserError as error:
        one_line(error, 40)
        return False
    check_spec(spec)
    return True


def spec_file(folder: Path, data: bytes) -> bool:
    path = folder / "spec.yaml"
    path.write_bytes(data)
    try:
        spec = load_spec(path)
    except UserError as error:
        one_line(error, 40)
        assert all(line.startswith(f"{path}: ") for line in str(error).split("\n"))
        return False
    check_spec(spec)
    return True


def override(folder: Path, assignments: list[str]) -> bool:
    return spec_values(folder, FULL, assignments)


def rubric_file(folder: Path, data: bytes) -> bool:
    path = folder / "rubric.yaml"
    path.write_bytes(data)
    try:
        rubric = load_rubric(str(path))
    except UserError as error:
        one_line(error, 40)
        assert str(error).startswith("judge.rubric: ")
        return False
    assert len(rubric.sha256) == len(rubric.questions_sha256) == 64
    for question in rubric.questions:
        longest = 2 * (2000 + len(question.text)) * (1 + question.text.count("{"))
        for prompt in ("a {0} {prompt!r} %s", "x" * 100_000):
            assert len(question.format(prompt, 5, dict.fromkeys(question.takes, "a, b")).encode()) < longest
    return True


def records_file(folder: Path, file: tuple[str, bytes]) -> bool:
    path = folder / f"records{file[0]}"
    path.write_bytes(file[1])
    try:
        rows = list(resolve_prompts(parse_spec({"prompts": {"path": str(path)}})))
    except UserError as error:
        one_line(error)
        assert str(error).startswith(f"prompts.path: {path}")
        return False
    if rows:
        pa.Table.from_pylist(rows, pa.schema([field for field in PROMPTS if field.name in rows[0]]))
    return True


def labels_file(folder: Path, data: bytes) -> bool:
    path = folder / "labels.csv"
    path.write_bytes(data)
    try:
        done = label(Storage(str(folder / "v1")), str(path))
    except UserError as error:
        one_line(error)
        assert str(error).startswith(f"{path}: ")
        return False
    return done.samples > 0


Check = Callable[[Path, Any], bool]
"""Folder for the file, and what is in it: whether it is taken. What is refused is refused in a line."""
KINDS: dict[str, tuple[st.SearchStrategy[Any], Check]] = {
    "spec": (mutations(FULL), spec_values),
    "spec file": (yaml_files(FULL), spec_file),
    "set": (ASSIGNMENTS, override),
    "rubric": (RUBRIC_FILES, rubric_file),
    "records": (RECORD_FILES, records_file),
    "labels": (LABEL_FILES, labels_file),
}


def fuzz(kind: str, folder: Path, count: int, number: int | None = None) -> None:
    values, check = KINDS[kind]
    taken: list[bool] = []

    def taken_or_refused(value: Any) -> None:
        taken.append(check(folder, value))

    quiet = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.filter_too_much,
    ]
    taken_or_refused.__qualname__ = kind  # a seed of its own where none is given
    test = given(values)(taken_or_refused)
    if number is not None:
        test = seed(number)(test)
    settings(
        max_examples=count, deadline=SLOWEST, derandomize=number is None, database=None, suppress_health_check=quiet
    )(test)()
    assert 0.02 < sum(taken) / len(taken) < 0.98, "nearly all are refused, or nearly none: that is no test of the other"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the files are written, with a dataset that labels may be about."""
    shutil.copytree(REPO / "tests" / "data" / "v1", tmp_path / "v1")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_file_holds_is_taken_or_refused_in_a_line(kind: str, folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(kind, folder, FEW)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MOST_MEMORY


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_files_at_random_are_taken_or_refused_in_a_line(kind: str, folder: Path) -> None:
    number = secrets.randbits(32)
    count = -(-SOAK // len(KINDS))
    print(f"{kind}: {count} examples, seed {number}; again: fuzz({kind!r}, folder, {count}, {number})")
    fuzz(kind, folder, count, number)
