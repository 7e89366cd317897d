"""What the report counts and shows, without a browser."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.secrets import redact
from infra.storage import Storage
from pipelines import charts
from pipelines.contact_sheet import contact_sheet
from pipelines.decisions import read_decisions
from pipelines.gallery import choose, clamp, gallery
from pipelines.report import MAX_BYTES, build_report
from pipelines.report_data import Facts, Snapshot, read_facts, reason_kind
from pipelines.report_media import show
from pipelines.run_log import Threshold, read_runs, thresholds

FIRST, SECOND = "0" * 32, f"{2654435761 % 2**32:08x}".ljust(32, "0")


def facts_of(storage: Storage) -> Facts:
    return read_facts(Snapshot(storage), read_decisions(storage))


def page_of(storage: Storage) -> str:
    return Path(build_report(storage, sheet=False).path).read_text()


def test_summary_counts_what_the_tables_hold(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=9, rejected=4, failures=3)
    summary = build_report(storage)
    assert (summary.accepted, summary.rejected, summary.failed, summary.shown) == (9, 4, 3, 13)
    assert storage.size("report/index.html") == summary.nbytes < MAX_BYTES
    steps = dict(summary.funnel)
    assert steps["planned"] == 16 and steps["generated"] == 13 and steps["accepted"] == 9
    assert steps["passed ScoreMedia"] == steps["judged"] == 13 - static_of(storage)
    assert steps["nan_latents"] == 2 and steps["empty_prompt"] == 1


def static_of(storage: Storage) -> int:
    rows = Snapshot(storage).take(range(13), ("reasons",))
    return sum(any(reason.startswith("static") for reason in row["reasons"]) for row in rows.values())


def test_cost_is_all_that_runs_had_allocated(dataset: Callable[..., Storage]) -> None:
    facts = facts_of(dataset(accepted=9, rejected=3, failures=0))
    rows = sum(cost.accelerator_seconds for cost in facts.costs)
    assert facts.unended == 0
    assert facts.accelerator_seconds == pytest.approx(rows + sum(facts.overhead.values()))
    assert facts.overhead == pytest.approx({"boot": 6.2, "load": 22.2, "idle": 13.0, "unshared": 0.8, "tail": 1.4})
    assert facts.accelerator_seconds_per_accepted == pytest.approx(facts.accelerator_seconds / 9)


def test_cost_of_runs_without_an_end_is_what_rows_say(dataset: Callable[..., Storage]) -> None:
    facts = facts_of(dataset(accepted=4, rejected=1, failures=0, runs=False))
    assert facts.accelerator_seconds == pytest.approx(sum(cost.accelerator_seconds for cost in facts.costs))


def test_annotations_win_the_latest_of_them(dataset: Callable[..., Storage]) -> None:
    notes = (
        (FIRST, "verdict", "", "accepted"),
        (FIRST, "verdict", "", "rejected"),
        (FIRST, "caption", "short", "an older caption"),
        (FIRST, "caption", "short", "a newer caption"),
        (FIRST, "score", "prompt_match", "0.01"),
        (FIRST, "label", "", "no"),
        (SECOND, "withdrawn", "", "a face in it"),
    )
    storage = dataset(accepted=6, rejected=0, failures=0, annotations=notes)
    facts = facts_of(storage)
    assert (facts.accepted, facts.rejected, facts.withdrawn, facts.generated) == (4, 1, 1, 5)
    page = page_of(storage)
    card = page[page.index(f'data-id="{FIRST}"') :].split("</article>")[0]
    assert "a newer caption" in card and "an older caption" not in card
    assert 'data-given="no"' in card and "was accepted; rejected by a person" in card and "0.01" in card
    assert SECOND not in page and "1 withdrawn sample left out" in page


def test_reasons_are_those_of_the_verdict_that_holds(dataset: Callable[..., Storage]) -> None:
    before = facts_of(dataset(accepted=2, rejected=1, failures=0))
    notes = (
        (FIRST, "verdict", "", "rejected"),
        (FIRST, "note", "verdict", "beauty 0.1 < 0.5"),
        (SECOND, "verdict", "", "accepted"),
    )
    storage = dataset(accepted=2, rejected=1, failures=0, annotations=notes)
    assert len(before.reasons) == 1
    assert facts_of(storage).reasons == (("beauty < 0.5", 1),)
    page = page_of(storage)
    assert "beauty 0.1 &lt; 0.5" in page[page.index(f'data-id="{FIRST}"') :].split("</article>")[0]


def test_a_withdrawal_can_be_taken_back(dataset: Callable[..., Storage]) -> None:
    notes = ((FIRST, "withdrawn", "", "true"), (FIRST, "withdrawn", "", "false"))
    facts = facts_of(dataset(accepted=2, rejected=0, failures=0, annotations=notes))
    assert facts.accepted == 2 and facts.withdrawn == 0


@pytest.mark.parametrize(
    "made",
    [
        {"accepted": 0, "rejected": 0, "failures": 0, "runs": False},
        {"accepted": 0, "rejected": 0, "failures": 2},
        {"accepted": 0, "rejected": 3, "failures": 0},
        {"accepted": 2, "rejected": 1, "failures": 0, "num_frames": 1},
    ],
    ids=["empty", "failures", "rejected", "images"],
)
def test_any_dataset_gives_a_page_and_a_sheet(dataset: Callable[..., Storage], made: dict) -> None:
    storage = dataset(**made)
    summary = build_report(storage)
    assert summary.shown == made["accepted"] + made["rejected"]
    assert Image.open(io.BytesIO(storage.read_bytes("report/contact_sheet.png"))).format == "PNG"


def test_a_place_without_a_dataset_gives_an_empty_page(tmp_path: Path) -> None:
    summary = build_report(Storage(str(tmp_path / "nothing")))
    assert summary.shown == summary.planned == 0


def test_missing_media_are_a_note_and_not_the_end(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=4, rejected=2, failures=0)
    for name in storage.files("media"):
        storage.delete(name)
    page = page_of(storage)
    assert page.count("cannot be shown") == 2 * 4  # on the card and in its details
    assert page.count('class="strip"') == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard": "../../secret"}, "outside of the dataset"),
        ({"shard": "/etc/hostname"}, "outside of the dataset"),
        ({"shard": "https://example.org/x.tar"}, "outside of the dataset"),
        ({"mime": "text/html"}, "nothing that a page can show"),
        ({"mime": "image/svg+xml"}, "nothing that a page can show"),
        ({"nbytes": 10**9}, "expected 1000000000 bytes"),
    ],
)
def test_a_row_cannot_bring_in_other_files_or_types(dataset: Callable[..., Storage], change: dict, said: str) -> None:
    storage = dataset(accepted=1, rejected=0, failures=0)
    row = Snapshot(storage).take([0], ("media", "height", "width", "num_frames", "fps"))[0]
    assert show(storage, row, 10**6).kind == "video"
    row["media"][0] |= change
    shown = show(storage, row, 10**6)
    assert shown.kind == "none" and shown.uri == "" and said in shown.note


def test_large_media_become_smaller_copies(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=1, rejected=0, failures=0, side=512, num_frames=5)
    row = Snapshot(storage).take([0], ("media", "height", "width", "num_frames", "fps"))[0]
    whole, copy = show(storage, row, 10**6), show(storage, row, 100)
    assert copy.note == "smaller copy" and whole.note == ""
    assert len(copy.uri) < len(whole.uri)


def test_page_stays_within_its_bytes_and_says_what_it_shows(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=30, rejected=10, failures=0)
    summary = build_report(storage, max_samples=12, sheet=False)
    assert summary.shown == 12
    assert "12 of 40 samples, evenly chosen" in Path(summary.path).read_text()
    small = build_report(storage, max_bytes=500_000, sheet=False)
    assert 0 < small.shown < 40 and small.nbytes < 500_000


def test_choice_is_even_and_fair_to_both_sides() -> None:
    positions = {"accepted": np.arange(0, 9000), "rejected": np.arange(9000, 10000)}
    chosen = choose(positions, 500)
    accepted = sorted(at for at in chosen if at < 9000)
    assert len(set(chosen)) == 500 and len(accepted) == 250
    assert np.diff(accepted).tolist() == [36] * 249
    few = choose(positions | {"rejected": np.arange(9000, 9020)}, 500)
    assert sum(at >= 9000 for at in few) == 20 and len(few) == 500
    beginning = [at for at in chosen[:64] if at < 9000]  # a page that is full early is even too
    assert len(beginning) == 32 and max(np.diff(sorted(beginning))) <= 2 * 9000 / 32


def test_every_sample_is_shown_where_all_fit(dataset: Callable[..., Storage]) -> None:
    storage = dataset(accepted=7, rejected=3, failures=0)
    decisions, snapshot = read_decisions(storage), Snapshot(storage)
    tiles = gallery(storage, snapshot, read_facts(snapshot, decisions), decisions, 500, MAX_BYTES)
    assert len({tile.sample_id for tile in tiles}) == 10
    assert [tile.created_at for tile in tiles] == sorted(tile.created_at for tile in tiles)


def test_page_asks_for_nothing_and_runs_its_own_script_only(dataset: Callable[..., Storage]) -> None:
    page = page_of(dataset(accepted=3, rejected=1, failures=0))
    assert not re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"' >]+""", page.split("<script>")[0])
    assert "@import" not in page and "url(" not in page
    assert page.count("<script") == 1 and "script-src 'sha256-" in page and "default-src 'none'" in page
    assert "hunter2" not in page


def test_contact_sheet_is_a_grid_of_stills(dataset: Callable[..., Storage]) -> None:
    data = contact_sheet(dataset(accepted=7, rejected=2, failures=0), n=9, side=32)
    image = np.asarray(Image.open(io.BytesIO(data)))
    assert image.shape == (3 * 36 + 4, 3 * 36 + 4, 3)
    tiles = [image[4 + 36 * line : 36 + 36 * line, 4 + 36 * at : 36 + 36 * at] for line in range(3) for at in range(3)]
    marked = [bool((tile == (224, 122, 63)).all(axis=-1).any()) for tile in tiles]
    assert marked == [False] * 7 + [True] * 2
    assert all(tile.std() > 5 for tile in tiles)


def test_histogram_bars_hold_every_value() -> None:
    accepted, rejected = np.linspace(0.4, 1, 50), np.linspace(0, 0.6, 20)
    svg = charts.histogram("match", (accepted, rejected), [Threshold(0.5, True)])
    counts = {kind: sum(map(int, re.findall(rf": (\d+) {kind}<", svg))) for kind in ("accepted", "rejected")}
    assert counts == {"accepted": 50, "rejected": 20} and "at least 0.5" in svg


def test_throughput_bars_hold_every_sample() -> None:
    times = {"a": (np.arange(0.0, 60), np.arange(0.0, 30)), "b": (np.array([90_000.0]), np.zeros(0))}
    svg, note = charts.throughput(times, stride=3)
    assert sum(map(int, re.findall(r"in: (\d+) accepted<", svg))) == 61 * 3
    assert sum(map(int, re.findall(r"in: (\d+) rejected<", svg))) == 30 * 3
    assert note == "each bar is 2 s" and svg.count('class="pause"') == 1


def test_chart_text_is_escaped() -> None:
    svg = charts.funnel([charts.Step("</svg><script>", 3)]) + charts.stacked([('"><b>', 1.0, "shade-0")])
    assert "<script>" not in svg and "<b>" not in svg


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (2.8753, "2.88"), (1234.5, "1,234"), (0.0123456, "0.0123"), (100, "100"), (1e-9, "1.00e-09")],
)
def test_numbers_read_like_numbers(value: float, said: str) -> None:
    assert charts.number(value) == said


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("motion 0.02 < 0.1", "motion < 0.1"),
        ("static: no frame differs from the first", "static"),
        ("duplicate of 00ff: perceptual hashes differ in 0 of 64 bits", "duplicate"),
        ("my own words", "my own words"),
    ],
)
def test_reasons_are_counted_by_kind(reason: str, kind: str) -> None:
    assert reason_kind(reason) == kind


def test_thresholds_come_from_the_spec_and_its_rubric() -> None:
    spec = {
        "score": {"min_motion": 0.1, "max_motion": 9, "reject_static": True, "max_flicker": None},
        "judge": {"backend": "transformers", "rubric": "default", "thresholds": {"prompt_match": 0.7}},
    }
    found = thresholds(spec)
    assert found["motion"] == [Threshold(0.1, True), Threshold(9.0, False)]
    assert found["prompt_match"] == [Threshold(0.7, True)] and found["no_artefacts"] == [Threshold(0.5, True)]
    assert set(found) == {"motion", "prompt_match", "no_artefacts", "motion_smooth"}
    spec["judge"] |= {"rubric": ["default", "people"], "decompose": {"threshold": 0.75}}
    assert thresholds(spec)["decomposed"] == [Threshold(0.75, True)] and "hands_right" in thresholds(spec)


def test_a_killed_run_has_no_end() -> None:
    (run,) = read_runs([{"run_id": "r", "event": "started", "status": "running", "command": "x s3://me:pw@b/c"}])
    assert run.status == "did not end" and run.allocated is None and run.command == "x s3://b/c"


def test_redact_takes_credentials_out_of_urls_only() -> None:
    assert redact("s3://key:secret@bucket/a@b and me@home") == "s3://bucket/a@b and me@home"


def test_clamp_says_how_long_it_was() -> None:
    assert clamp("abc", 3) == "abc" and clamp("a" * 10_000) == "a" * 1000 + "… (10,000 characters)"
