"""`ditmill bench pack`: its figures on clips whose truth is known, and the whole of it on random weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from models.pack.grammar import is_complete, keeps
from models.pack.oracle import match, read
from models.pack.phrases import parse
from models.pack.train.intervals import bootstrap, wilson
from models.pack.train.loop import stream
from models.pack.world import render
from tests.bench.support.figures import Figure, share, table
from tests.bench.support.pack_parts import altered, held_out


def test_wilson_is_the_textbook_interval() -> None:
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-3)
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.Generator(np.random.Philox(key=1)).standard_normal(400)
    low, high = bootstrap(lambda each: float(each.mean()), values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_held_out_prompts_are_complete_sentences_of_the_grammar() -> None:
    asked = held_out(60, 0)
    for scene, prompt in zip(asked.scenes, asked.prompts, strict=True):
        assert is_complete(scene) and keeps(parse(prompt), scene)
    assert held_out(60, 0) == asked and held_out(60, 1) != asked


@pytest.mark.parametrize("image", [False, True])
def test_an_altered_prompt_is_wrong_on_the_clip_in_one_attribute(image: bool) -> None:
    asked = held_out(40, 3, kinds=("one",), image=image)
    clips = render(asked.scenes, range(40), num_frames=asked.num_frames)
    for scene, clip in zip(asked.scenes, clips, strict=True):
        found = match(read(clip), altered(scene, stream(0, 1)))
        assert 1 <= sum(not good for good in found.values()) <= 2  # a motion may bring a size of its own


def test_a_figure_meets_its_target_or_misses_it_or_has_none() -> None:
    assert share("part", "name", 95, 100, 0.9).met is True
    assert share("part", "name", 85, 100, 0.9).met is False
    assert Figure("part", "name", 2.0, target=1.0, sense="at most").met is False
    assert Figure("part", "name", None, target=1.0, note="not there").met is None
    lines = table([share("part", "name", 85, 100, 0.9), Figure("judge", "", None, note="not there")]).splitlines()
    assert "85.0 %" in lines[1] and "at least 90.0: MISSED" in lines[1]
    assert lines[2].split() == ["judge", "not", "there"]


def test_bench_pack_measures_the_parts_that_are_there(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.bench.pack import main

    for part in ("generator", "expander"):
        shutil.copytree(tiny_pack / part, tmp_path / "pack" / part)
    options = ["--folder", str(tmp_path / "pack"), "--samples", "4", "--steps", "1", "--json"]
    options += ["--sheet", str(tmp_path / "sheet.png")]
    monkeypatch.setattr(sys, "argv", ["pack", *options])
    main()
    found = {(row["part"], row["name"]): row for row in json.loads(capsys.readouterr().out)}
    assert found["judge", ""]["note"] == "not there"
    assert found["generator", "one figure, all right"]["n"] == 2
    assert found["generator", "one figure, all right"]["met"] is False
    assert found["generator", "a clip, CPU-seconds"]["value"] > 0
    assert found["VAE", "PSNR of reconstructions"]["n"] == 4
    assert found["images", "all right"]["n"] == 1
    assert found["expander", "in the grammar"]["n"] == 4
    assert (tmp_path / "sheet.png").stat().st_size > 1000
