from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.lock import render

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _locked(*files: str) -> dict[str, str]:
    lines = [line for file in files for line in (REPO / file).read_text(encoding="utf-8").splitlines()]
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    return {
        item.name: next(iter(item.specifier)).version for item in pinned if not item.marker or item.marker.evaluate()
    }


CORE = _locked("requirements.lock")
ALL = _locked("requirements.lock", "requirements-test.lock")

TELEMETRY = _locked("requirements.lock", "requirements-telemetry.lock")


@pytest.mark.parametrize(
    ("requirement", "locked"),
    [(item, CORE) for item in PROJECT["dependencies"]]
    + [(item, ALL) for name in ("test", "train") for item in PROJECT["optional-dependencies"][name]]
    + [(item, TELEMETRY) for item in PROJECT["optional-dependencies"]["telemetry"]],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lock_holds_what_the_project_asks_for(requirement: str, locked: dict[str, str]) -> None:
    asked = Requirement(requirement)
    found = locked.get(canonicalize_name(asked.name))
    assert found is not None and asked.specifier.contains(found), "run: make lock"


@pytest.mark.parametrize("name", sorted(ALL))
def test_lock_is_what_is_installed(name: str) -> None:
    assert version(name).partition("+")[0] == ALL[name], "run: make install"


def test_the_telemetry_lock_goes_with_that_of_the_tests() -> None:
    assert {name: ALL[name] for name in ALL.keys() & TELEMETRY.keys()} == {
        name: TELEMETRY[name] for name in ALL.keys() & TELEMETRY.keys()
    }


def test_s3_in_tests_and_in_runs_agree_on_one_botocore() -> None:
    """s3fs and moto each pin a range; it is empty more often than not."""
    assert "botocore" in CORE and ALL["boto3"].split(".")[:2] == CORE["botocore"].split(".")[:2]


def test_lock_has_no_cuda() -> None:
    assert not [name for name in ALL if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_a_package_that_one_python_lacks_carries_a_marker() -> None:
    text = render({"3.11": {"both": "1", "old": "2"}, "3.12": {"both": "1", "new": "3"}}, "Title")
    assert text.splitlines()[1:] == [
        "both==1",
        'new==3 ; python_version == "3.12"',
        'old==2 ; python_version == "3.11"',
    ]
