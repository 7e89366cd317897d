from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import UserError
from models.multimodal import Multimodal
from models.prefix import Prefixes
from models.token_drop import only, read_tokens
from tests.models.test_multimodal import INSTRUCTION, QUESTIONS, clips, model  # noqa: F401


def moving(count: int = 3, num_frames: int = 6) -> np.ndarray:
    """A white square of 16 that steps right over grey, uint8 [count, num_frames, 64, 64, 3]; the last clip stands still."""
    frames = np.full((count, num_frames, 64, 64, 3), 90, dtype=np.uint8)
    for clip in range(count):
        for at in range(num_frames):
            left = 16 * (min(at, 3) if clip < count - 1 else 0)
            frames[clip, at, 16 * clip : 16 * clip + 16, left : left + 16] = 250
    return frames


def test_what_stands_still_is_read_once():
    still = np.repeat(clips(1, num_frames=1)[0], 5, axis=0)
    assert read_tokens(still, 16, 0.01).sum(axis=1).tolist() == [16, 0, 0, 0, 0]


def test_what_changes_is_read_where_it_changes_and_no_less_than_whole_frames_of_it():
    read = read_tokens(moving(1)[0], 16, 0.01).reshape(6, 4, 4)
    assert read[0].all()
    rows = [(0, 1), (1, 2), (2, 3)]
    read = read_tokens(moving(2)[0], 16, 0.01).reshape(6, 4, 4)
    for at, places in enumerate(rows, 1):
        assert read[at, 0, list(places)].all()
    assert read.sum() == 32  # 16 of the first frame, 2 in each of three, and 10 more


def test_what_changes_slowly_is_read_in_the_end():
    slowly = np.zeros((20, 64, 64, 3), dtype=np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None] * 3
    read = read_tokens(slowly, 1, 0.05).ravel()
    assert np.abs(np.diff(slowly[:, 0, 0, 0].astype(int))).max() / 255 < 0.05
    assert np.flatnonzero(read).tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize(("height", "width", "per_frame", "grid"), [(48, 96, 32, (4, 8)), (90, 50, 6, (3, 2))])
def test_tokens_lie_in_a_grid_of_the_frames_shape(height, width, per_frame, grid):
    clip = np.zeros((2, height, width, 3), dtype=np.uint8)
    clip[1, -1, -1] = 255
    clip[1, -1, 0] = 255
    read = read_tokens(clip, per_frame, 0.0001)
    change = np.zeros(grid, dtype=bool)
    change[-1, [0, -1]] = True
    assert read[1][change.ravel()].all()


def test_tokens_that_make_no_grid_are_refused():
    with pytest.raises(
        UserError, match=r"token_drop: the model makes 7 tokens of a frame of 64x64, which are no grid; set 0"
    ):
        read_tokens(clips(1)[0], 7, 0.1)


def dropping(model: Multimodal, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(model, "ref", replace(model.ref, token_drop=threshold))
    monkeypatch.setattr(model, "_prefixes", Prefixes(10**6))


def test_answers_are_those_of_a_pass_that_does_not_attend_to_what_is_dropped(model, monkeypatch):  # noqa: F811
    frames = moving()
    plain = model.p_yes(frames, [QUESTIONS] * 3)
    dropping(model, 0.01, monkeypatch)
    found = model.p_yes(frames, [QUESTIONS] * 3)
    yes, no = model._yes, model._no
    dropped = []
    for clip, row in zip(frames, found, strict=True):
        for asked, p_yes in zip(QUESTIONS, row, strict=True):
            inputs, mask = masked(model, clip, asked)
            dropped.append(int((mask == 0).sum()))
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            if hasattr(model.model.base_model, "get_rope_index"):
                grid = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids") if name in inputs}
                positions, _ = model.model.base_model.get_rope_index(inputs["input_ids"], **grid)
            inputs["attention_mask"] = mask
            with torch.inference_mode():
                mass = torch.softmax(model.model(**inputs, position_ids=positions).logits[0, -1].double(), dim=-1)
            assert p_yes == pytest.approx((mass[yes].sum() / mass[torch.cat([yes, no])].sum()).item(), abs=1e-5)
    assert max(dropped) > min(dropped) > 0
    assert np.abs(found - plain).max() > 1e-5
    alone = [model.p_yes(frames[at : at + 1], [QUESTIONS])[0] for at in range(3)]
    np.testing.assert_allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize(
    "model", ["shapes", "llava", "idefics3"], indirect=True
)  # Qwen's positions skip what is masked
def test_captions_are_those_of_a_pass_that_does_not_attend_to_what_is_dropped(model, monkeypatch):  # noqa: F811
    dropping(model, 0.01, monkeypatch)
    frames = moving()
    for clip, (text,) in zip(frames, model.caption(frames, [INSTRUCTION], 8), strict=True):
        inputs, mask = masked(model, clip, INSTRUCTION)
        inputs["attention_mask"] = mask
        with torch.inference_mode():
            tokens = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
        assert text == " ".join(model.tokenizer.decode(tokens, skip_special_tokens=True).split())


def masked(model: Multimodal, clip: np.ndarray, text: str) -> tuple[Any, torch.Tensor]:  # noqa: F811
    """A whole conversation, and a mask of its tokens with 0 for what is dropped."""
    inputs = model._inputs([(clip, text)])
    images = (inputs["input_ids"][0] == model.model.config.image_token_id).nonzero()[:, 0]
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, images] = torch.tensor(read_tokens(clip, len(images) // len(clip), 0.01).ravel(), dtype=mask.dtype)
    return inputs, mask


def test_a_clip_in_which_everything_changes_is_read_whole(model, monkeypatch):  # noqa: F811
    frames = clips(2)
    plain = model.p_yes(frames, [QUESTIONS] * 2)
    dropping(model, 1e-6, monkeypatch)
    np.testing.assert_array_equal(model.p_yes(frames, [QUESTIONS] * 2), plain)


def test_a_family_that_hands_more_than_embeddings_to_its_language_model_is_refused(model):  # noqa: F811
    class Decoder(torch.nn.Module):
        def forward(self, **_):
            raise AssertionError

    decoder = Decoder()
    columns = torch.arange(3)[None]
    with (
        pytest.raises(UserError, match=r"reads vision tokens in several layers \(visual_pos_masks\); set 0"),
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(model.model, "get_decoder", lambda: decoder)
        with only(model.model, columns):
            decoder(inputs_embeds=torch.zeros(1, 4, 2), visual_pos_masks=torch.ones(1, 4))
