from __future__ import annotations

import numpy as np
import pytest

from models.multimodal import MultimodalRef, load_multimodal
from stages.batch import Batch, load_json, texts
from stages.caption import INSTRUCTIONS, CaptionMedia
from stages.judge import JudgeQuality
from stages.rubric import load_rubric


def batch(num_frames: int) -> Batch:
    coarse = np.random.default_rng(0).integers(0, 256, (3, num_frames, 4, 4, 3), dtype=np.uint8)
    return {"prompt": texts(["a", "b", "c"]), "frames": coarse.repeat(16, axis=2).repeat(16, axis=3)}


@pytest.fixture
def ref(tiny_pack):
    return MultimodalRef(str(tiny_pack / "judge"))


@pytest.mark.parametrize(("num_frames", "media"), [(9, "video"), (1, "image")])
def test_caption_writes_each_style(ref, num_frames, media):
    stage = CaptionMedia(ref, ("dense", "short"), max_new_tokens=5, num_frames=4, label="pack://tiny")
    stage.load()
    out = stage(batch(num_frames))
    shown = batch(num_frames)["frames"][:, [0, 3, 5, 8] if num_frames > 1 else [0]]
    instructions = [INSTRUCTIONS[style].format(media=media) for style in ("dense", "short")]
    expected = load_multimodal(ref).caption(shown, instructions, 5)
    for row, (dense, short) in zip(load_json(out["captions"]), expected, strict=True):
        common = {"language": "en", "scene": 0, "model": "pack://tiny"}
        assert row == [{"style": "dense", "text": dense, **common}, {"style": "short", "text": short, **common}]
    assert list(out["caption"]) == [dense for dense, _ in expected]
    assert all(out["caption"])


def test_caption_and_judge_share_a_model(ref):
    load_multimodal.cache_clear()
    CaptionMedia(ref).load()
    JudgeQuality(load_rubric("default"), ref).load()
    assert load_multimodal.cache_info().misses == 1
