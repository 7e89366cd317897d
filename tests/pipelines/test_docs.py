"""The docs say what the code says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.metrics import METRICS
from infra.schema import FAILURES, SAMPLES
from infra.storage import Storage
from pipelines.exporters import FORMATS
from pipelines.spec_docs import FILE, render
from stages.rubric import built_in_rubrics, load_rubric

REPO = Path(__file__).parents[2]
PAGES = [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").rglob("*.md"))]


def _page(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def _source(*folders: str) -> str:
    paths = [path for folder in folders for path in sorted((REPO / folder).rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _first_column(page: str, heading: str) -> set[str]:
    """The names in the first column of the table below `heading`."""
    section = _page(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_spec_page_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == render(), "run: python -m pipelines.spec_docs"


def test_rubrics_page_has_every_question_that_is_built_in() -> None:
    page = _page("docs/rubrics.md").partition("## Built in")[2]
    sections = {text.partition("**")[0]: text for text in page.split("\n**")[1:]}
    rows = {
        name: [
            f"| `{each.name}` | {each.text.removesuffix(' Answer Yes or No.')} | {each.threshold:g} |" for each in asked
        ]
        for name in built_in_rubrics()
        for asked in [load_rubric(name).questions]
    }
    assert {
        name: [line for line in text.splitlines() if line.startswith("| `")] for name, text in sections.items()
    } == rows


def test_spec_page_links_to_sections_that_exist() -> None:
    text = render()
    titles = [line.strip("# `") for line in text.splitlines() if line.startswith("## ")]
    headings = {title.translate({ord(sign): None for sign in ".[]"}) for title in titles}
    linked = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert linked and linked <= headings


def test_export_page_has_every_format() -> None:
    section = _page("docs/export.md").split("\n## Formats\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE)) == set(FORMATS)


def test_every_error_type_that_a_stage_raises_is_documented() -> None:
    raised = set(re.findall(r'SampleError\(\s*"(\w+)"', _source("stages", "models")))
    assert raised and raised <= _first_column("docs/operations.md", "Samples that fail")


def test_every_documented_error_type_exists() -> None:
    quoted = set(re.findall(r'"(\w+)"', _source("stages", "models", "pipelines")))
    assert _first_column("docs/operations.md", "Samples that fail") <= quoted


def test_findings_of_verify_are_the_documented_ones() -> None:
    source = _page("pipelines/verify.py")
    found = set(re.findall(r'Finding\(\s*"(\w+)"', source))
    found |= set(re.findall(r'kind = "(\w+)" if .* else "(\w+)"', source)[0])
    assert found == _first_column("docs/operations.md", "Verify")


def test_metrics_are_the_documented_ones() -> None:
    assert _first_column("docs/operations.md", "Watching a run") == {f"ray_{metric.name}" for metric in METRICS}


def test_columns_of_samples_are_the_documented_ones() -> None:
    assert _first_column("docs/dataset.md", "Columns of `samples`") == set(SAMPLES.names)


def test_columns_of_failures_are_the_documented_ones() -> None:
    listed = re.search(r"`failures` holds `([^`]+)`", " ".join(_page("docs/dataset.md").split()))
    assert listed and listed[1].split(", ") == FAILURES.names


def test_architecture_names_files_that_exist() -> None:
    named = re.findall(r"`((?:flows|pipelines|stages|models|infra)/[\w./]+)`", _page("ARCHITECTURE.md"))
    assert named and [path for path in named if not (REPO / path).exists()] == []


def test_snippets_that_read_a_dataset_run(
    dataset: Callable[..., Storage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = dataset(accepted=3, rejected=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quickstart").symlink_to(storage.root)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", _page("docs/dataset.md"), re.DOTALL)
    ran: list[dict[str, Any]] = []
    for snippet in snippets:
        ran.append({})
        exec(snippet, ran[-1])
    by_pyarrow, by_datasets, by_webdataset = ran
    assert len(by_pyarrow["accepted"]) == 3
    assert by_datasets["rows"].num_rows == 4
    assert "mp4" in by_datasets["media"].features
    assert by_webdataset["sample"]["__key__"] in {row["sample_id"] for row in by_pyarrow["accepted"]}
    assert len(capsys.readouterr().out.splitlines()) == 6
