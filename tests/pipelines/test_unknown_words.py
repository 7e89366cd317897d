"""A generator that does not know a word says so once a run, before it samples."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from models.pack.train.text import build_tokenizer
from pipelines.plan import make_plan, render
from pipelines.resolve import resolve_spec
from pipelines.run import expand, open_dataset
from pipelines.spec import Spec, parse_spec


@pytest.fixture
def generator(tiny_pack: Path, tmp_path: Path) -> str:
    """A checkpoint whose tokenizer has an unknown token."""
    folder = Path(shutil.copytree(tiny_pack / "generator", tmp_path / "generator"))
    shutil.rmtree(folder / "tokenizer")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    return str(folder)


def _spec(root: Path, generator: str, prompts: list[Any]) -> Spec:
    return parse_spec(
        {
            "prompts": {"inline": prompts},
            "generators": [{"model": generator}],
            "judge": {"backend": "none"},
            "caption": None,
            "output": {"uri": str(root)},
        }
    )


def _warnings(spec: Spec) -> list[str]:
    run = resolve_spec(spec)
    open_dataset(run)
    with capture_logs() as lines:
        expand(run, lambda: ())
    return [line["event"] for line in lines if line["log_level"] == "warning"]


def test_one_warning_a_run_names_all_words_that_the_generator_does_not_know(tmp_path: Path, generator: str) -> None:
    prompts = [
        "a red circle",
        "a red cat",
        "a cat on a blue sofa",
        *(f"a {colour} star" for colour in ("green", "red")),
    ]
    (warning,) = _warnings(_spec(tmp_path / "dataset", generator, prompts))
    assert "'cat', 'sofa'" in warning and "circle" not in warning
    assert warning.startswith(generator)


def test_many_unknown_words_are_counted_beyond_the_first(tmp_path: Path, generator: str) -> None:
    (warning,) = _warnings(_spec(tmp_path / "dataset", generator, [f"a word{at}" for at in range(23)]))
    assert "'word0'" in warning and "'word20'" not in warning and "and 3 more" in warning


@pytest.mark.parametrize("model", ["generator", "pack://tiny"])
def test_nothing_is_said_where_every_word_is_known(tmp_path: Path, generator: str, model: str) -> None:
    model = generator if model == "generator" else model
    prompts = ["a red circle"] if model == generator else ["a cat"]
    assert _warnings(_spec(tmp_path / "dataset", model, prompts)) == []


def test_plan_says_it_before_anything_runs(tmp_path: Path, generator: str) -> None:
    plan = make_plan(_spec(tmp_path / "dataset", generator, ["a red cat"]), calibrate=False)
    assert len(plan.warnings) == len(plan.as_dict()["warnings"]) == 1
    assert "'cat'" in next(line for line in render(plan, "spec.yaml").splitlines() if "warning" in line)
