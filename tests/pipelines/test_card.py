"""The card's header loads the dataset, and its text says what the tables say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from infra import schema
from infra.storage import Storage
from pipelines.card import COLUMNS, plain, write_card

HOSTILE = (
    "# </a><script>alert(1)</script> [x](javascript:alert(2)) | `c` ![i](http://e.org/i.png) {{ 7 * 7 }}\n---\n=cmd()"
)


def header_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """HF datasets with no network and a cache of its own."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path


def test_header_loads_the_samples(dataset: Callable[..., Storage], offline: Path) -> None:
    from datasets import load_dataset

    storage = dataset(accepted=4, rejected=2)
    header = header_of(write_card(storage))
    assert [config["config_name"] for config in header["configs"]] == ["samples"]
    rows = load_dataset(storage.root, "samples", split="train")
    assert rows.num_rows == 6 and set(rows.column_names) == set(schema.SAMPLES.names)
    assert {row["verdict"] for row in rows} == {"accepted", "rejected"}
    assert all(row["media"][0]["nbytes"] > 0 for row in rows)


def test_header_names_only_tables_with_rows(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=2, rejected=0, annotations=(("0" * 32, "label", "", "yes"),))
    header = header_of(write_card(storage, license="cc-by-4.0"))
    assert header["license"] == "cc-by-4.0"
    assert [config["config_name"] for config in header["configs"]] == ["samples", "annotations"]
    assert header["task_categories"] == ["text-to-video"] and header["size_categories"] == ["n<1K"]
    assert {"synthetic", "ditmill"} <= set(header["tags"])


def test_body_counts_and_says_how_it_was_made(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=4, rejected=2, failures=1, spec={"generators": [{"model": HOSTILE}]})
    text = write_card(storage)
    assert "| planned | 7 |" in text and "| accepted | 4 (66.7%) |" in text and "| failed | 1 |" in text
    assert "ditmill run quickstart.yaml" in text and "hunter2" not in text
    assert "apache" in text.lower() and "| yes |" in text
    assert "`prompt_match >= 0.55`" in text and "`no_artefacts >= 0.5`" in text
    assert "num_inference_steps=20" in text
    body = re.sub(r"(?s)```.*?```", "", text.split("---\n", 2)[2])
    outside = re.sub(r"`[^`\n]*`", "", body)  # within a code span nothing is markup
    assert "<" not in outside and "](javascript" not in outside and "](http" not in outside
    assert storage.read_bytes("README.md").decode() == text


def test_any_dataset_has_a_card(dataset: Callable[..., Storage]) -> None:
    text = write_card(dataset(accepted=0, rejected=0, failures=0, runs=False))
    assert "configs" not in header_of(text) and "| accepted | 0 |" in text


@pytest.mark.parametrize(
    ("at", "name"), [(0, "accepted"), (1, "accepted"), (2, "media")], ids=["datasets", "pyarrow", "tar"]
)
def test_ways_to_load_it_work_as_written(dataset: Callable[..., Storage], offline: Path, at: int, name: str) -> None:
    storage = dataset(accepted=3, rejected=1)
    block = re.findall(r"(?s)```python\n(.*?)```", write_card(storage))[at]
    found: dict = {}
    exec(block.replace("PATH_OR_REPO", storage.root).replace("PATH", storage.root), found)
    assert len(list(found[name])) == 3 if at != 1 else found[name].num_rows == 3


def test_columns_are_those_of_the_schema() -> None:
    named = {name for group in COLUMNS for name in group.split(", ")}
    assert named <= set(schema.SAMPLES.names)


def test_plain_text_is_one_line_without_markup() -> None:
    text = plain(HOSTILE)
    assert "\n" not in text and "<" not in text
    assert all(text[at - 1] == "\\" for at, mark in enumerate(text) if mark in "[]()|!*_`")
    assert len(plain("x" * 10_000)) < 400
