from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from pipelines import dedup
from pipelines.dedup import (
    AGAINST_EXCLUDED,
    AMONG_PROMPTS,
    Exclusions,
    NearIndex,
    RecordReport,
    SeenIds,
    Sketch,
    jaccard,
    shingles,
)
from pipelines.records import unique_records
from pipelines.spec import Prompts, Spec

LONG = "a small red fox runs through deep snow at dawn while the camera follows it from the left side of a quiet forest"
NEAR = LONG.replace("quiet", "silent")  # 23 words, 21 shingles, 2 of them changed: 19 of 23 shared
FAR = LONG.replace("red fox", "grey wolf").replace("snow", "sand").replace("left", "right")


def kept(*items: Any, **prompts: Any) -> tuple[list[str], RecordReport]:
    report = RecordReport()
    spec = Spec(prompts=Prompts(inline=items, **prompts))
    return [record.prompt for record in unique_records(spec, report)], report


def test_jaccard_of_shingles_is_what_it_says() -> None:
    assert jaccard(shingles(LONG), shingles(NEAR)) == pytest.approx(19 / 23)
    assert jaccard(shingles(LONG), shingles(LONG.upper() + "!")) == 1
    assert jaccard(shingles("one two three four"), shingles("one two three five")) == pytest.approx(1 / 3)
    assert jaccard(shingles(LONG), shingles(LONG, context="another")) == 0
    assert shingles(" ,. ") == frozenset()


def test_shingles_take_each_chinese_character_for_a_word() -> None:
    assert len(shingles("一只红色的狐狸在雪地里奔跑")) == 11
    assert jaccard(shingles("一只红色的狐狸在雪地里奔跑"), shingles("一只红色的狐狸在雪地里跳舞")) == pytest.approx(
        9 / 13
    )


@pytest.mark.parametrize(("rule", "wanted"), [("report", 3), ("drop", 2), ("ignore", 3)])
def test_near_duplicates_are_reported_dropped_or_ignored(rule: str, wanted: int) -> None:
    prompts, report = kept(LONG, FAR, NEAR, near_duplicates=rule, near_threshold=0.75)
    assert len(prompts) == wanted
    assert report.near_duplicates == (0 if rule == "ignore" else 1)
    assert report.near_dropped == (1 if rule == "drop" else 0)
    if rule != "ignore":
        (example,) = report.examples
        assert (example.kind, example.prompt, example.like) == ("near_duplicate", NEAR, LONG)


def test_near_duplicates_obey_the_threshold_exactly() -> None:
    assert Exclusions([LONG], threshold=19 / 23).match(NEAR) == LONG
    assert Exclusions([LONG], threshold=19 / 23 + 1e-6).match(NEAR) is None
    assert kept(LONG, LONG + ".", near_threshold=1)[1].near_duplicates == 1


def test_the_same_text_with_another_seed_or_input_is_no_near_duplicate(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    records = [LONG, {"prompt": LONG, "seed": 1}]
    records += [{"prompt": text, "image": str(tmp_path / name)} for text, name in ((LONG, "a"), (NEAR, "b"))]
    assert kept(*records, near_duplicates="drop", near_threshold=0.5)[1].kept == 4


def test_ignore_needs_no_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NearIndex, "__init__", lambda *_, **__: pytest.fail("a sketch was made"))
    assert kept(LONG, NEAR, near_duplicates="ignore")[1].kept == 2


def test_identical_records_collapse_and_are_counted() -> None:
    prompts, report = kept("a", "b", "a", "a")
    assert prompts == ["a", "b"]
    assert (report.read, report.identical, report.kept) == (4, 2, 2)
    assert report.summary() == "2 of 4 prompt records kept, 2 identical"


@pytest.mark.parametrize("rule", ["report", "ignore"])
def test_excluded_prompts_are_kept_out_exactly_and_nearly(tmp_path: Path, rule: str) -> None:
    (tmp_path / "bench.txt").write_text(f"A Cat\n{LONG}\n")
    (tmp_path / "more.csv").write_text("prompt\ntwo dogs\n")
    files = [str(tmp_path / name) for name in ("bench.txt", "more.csv")]
    prompts, report = kept(
        "a  cat", "a cat sleeps", NEAR, "TWO DOGS", exclude=files, near_threshold=0.75, near_duplicates=rule
    )
    assert prompts == ["a cat sleeps"]
    assert report.excluded == 3
    assert [(one.prompt, one.like) for one in report.examples] == [
        ("a  cat", "A Cat"),
        (NEAR, LONG),
        ("TWO DOGS", "two dogs"),
    ]


def test_exclusions_match_any_text() -> None:
    exclusions = Exclusions(["a cat on a mat"], threshold=0.85)
    assert exclusions.match("A cat, on a mat!") == "a cat on a mat"
    assert exclusions.match("a dog") is None
    assert Exclusions([], threshold=0.85).match("") is None


def test_a_missing_exclude_file_is_named() -> None:
    with pytest.raises(UserError, match=r"^prompts\.exclude\.0: nowhere\.txt does not exist"):
        kept("a", exclude=["nowhere.txt"])


def test_near_index_finds_most_near_and_nothing_else() -> None:
    rng = random.Random(0)
    words = [f"word{at}" for at in range(2000)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(300)]
    near = [text.rsplit(" ", 2)[0] + " x y" for text in texts]  # 56 of 60 shingles shared
    index = NearIndex(0.85)
    assert all(index.match_or_add(text) is None for text in texts)
    found = [index.match(text) for text in near]
    assert set(found) <= {*texts, None}
    assert sum(one == text for one, text in zip(found, texts, strict=True)) > 285


def test_near_index_forgets_what_left_its_window() -> None:
    index = NearIndex(0.85, window=10)
    for at in range(25):
        index.match_or_add(f"completely different prompt number {at} of {at * 7} and {at + 31}")
    assert index.match("completely different prompt number 24 of 168 and 55") is not None
    assert index.match("completely different prompt number 0 of 0 and 31") is None


@pytest.mark.parametrize("sketch", [AMONG_PROMPTS, AGAINST_EXCLUDED])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.85, 0.99, 1.0])
def test_sketch_bands_give_the_recall_at_the_threshold(sketch: Sketch, threshold: float) -> None:
    bands, rows = sketch.bands(threshold)
    assert 1 - (1 - threshold**rows) ** bands >= sketch.recall
    assert 1 < bands <= bands * rows <= sketch.num_perm


def test_near_index_takes_every_threshold_that_the_spec_allows() -> None:
    for threshold in (1e-6, 0.1, 0.5, 0.99, 1.0):
        index = NearIndex(threshold)
        index.match_or_add(LONG)
        assert index.match(LONG) == LONG


def test_near_duplicates_stay_within_a_millisecond_a_prompt() -> None:
    rng = random.Random(0)
    words = ["red", "blue", "big", "small", "fox", "cat", "runs", "sits", "on", "in", "snow", "sand"]
    texts = [" ".join(rng.choices(words, k=25)) for _ in range(1500)]
    started = time.process_time()
    kept(*texts)
    assert (time.process_time() - started) / len(texts) < 1e-3  # measured: 0.15 ms


def test_report_keeps_few_examples_of_each_kind() -> None:
    report = RecordReport()
    for at in range(20):
        report.example("identical", f"{at}" * 1000, "")
        report.example("excluded", f"{at}", "")
    assert len(report.examples) == 2 * dedup.EXAMPLES
    assert max(len(one.prompt) for one in report.examples) == 200
    assert report.as_dict()["examples"][1] == {"kind": "excluded", "prompt": "0", "like": ""}


def test_seen_ids_are_a_set() -> None:
    rng = random.Random(0)
    ids = [rng.randbytes(15) + bytes([at % 3]) for at in range(2000)]  # a third end in zeros
    seen, plain = SeenIds(pending=64), set()
    for one in rng.choices(ids, k=6000):
        assert seen.add(one) == (one not in plain)
        plain.add(one)
