from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from infra.errors import UserError
from models import multimodal
from models.multimodal import Multimodal, MultimodalRef, evenly_spaced, load_multimodal
from models.prefix import Prefixes
from models.source import resolve

INSTRUCTION = "Describe this video."
QUESTIONS = ["Is this clean? Answer Yes or No.", "Does it show a red circle that is bouncing slowly? Answer Yes or No."]


def clips(count: int, num_frames: int = 4, seed: int = 0) -> np.ndarray:
    """Coloured blobs [count, num_frames, 64, 64, 3] uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, num_frames, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(16, axis=2).repeat(16, axis=3)


def build_idefics3(folder: Path) -> None:
    """The family of SmolVLM, whose image processor cuts large pictures into tiles."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    from models.pack.tiny import fill_weights
    from models.pack.tiny_language import CHAT_TEMPLATE, build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]}
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    fill_weights(model, "idefics3")
    images = Idefics3ImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    model.save_pretrained(folder)
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def build_qwen2_vl(folder: Path) -> Any:
    """A model whose positions in a clip have three axes, saved; and its processor, without that of videos, which wants
    torchvision."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from models.pack.tiny import fill_weights
    from models.pack.tiny_language import CHAT_TEMPLATE, build_tokenizer

    tokenizer = build_tokenizer()
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    start, end, image, video = tokenizer.convert_tokens_to_ids(special)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )
    fill_weights(model, "qwen2_vl")
    model.save_pretrained(folder)

    class Images(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, *_: Any) -> None:
            pass

    template = CHAT_TEMPLATE.replace("'<image>'", "'<|vision_start|><|image_pad|><|vision_end|>'")
    pictures = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return Images(pictures, tokenizer, None, chat_template=template)


@pytest.fixture(scope="module", params=["shapes", "llava", "idefics3", "qwen2_vl"])
def model(request, tiny_pack: Path, tmp_path_factory) -> Multimodal:
    if request.param == "shapes":
        return Multimodal(MultimodalRef(resolve("pack://shapes", "judge")))
    if request.param == "llava":
        return Multimodal(MultimodalRef(str(tiny_pack / "judge")))
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "idefics3":
        build_idefics3(folder)
        return Multimodal(MultimodalRef(str(folder)))
    processor = build_qwen2_vl(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: processor)
        return Multimodal(MultimodalRef(str(folder)))


@pytest.fixture
def fresh(tiny_pack: Path) -> Multimodal:
    """A model of the test's own, to be spoilt."""
    return Multimodal(MultimodalRef(str(tiny_pack / "judge")))


def test_p_yes_equals_one_unpadded_forward_pass_per_question(model):
    frames = clips(2)
    found = model.p_yes(frames, [QUESTIONS, QUESTIONS[::-1]])
    yes, no = (
        [model.tokenizer.encode(text, add_special_tokens=False)[0] for text in (word, f" {word}")]
        for word in ("Yes", "No")
    )
    for clip, row, questions in zip(frames, found, [QUESTIONS, QUESTIONS[::-1]], strict=True):
        for p_yes, question in zip(row, questions, strict=True):
            inputs = model._inputs([(clip, question)])
            with torch.inference_mode():
                mass = torch.softmax(model.model(**inputs).logits[0, -1].double(), dim=-1)
            expected = mass[yes].sum() / mass[yes + no].sum()
            assert p_yes == pytest.approx(expected.item(), abs=1e-5)


def test_a_clip_is_read_once_for_all_that_is_asked_of_it(model, monkeypatch):
    """By the judge, and by the captioner after it, of what the judge let pass."""
    read: list[int] = []
    forward = model.model.base_model.forward

    def counted(*arguments, **keywords):
        if keywords.get("pixel_values") is not None:
            read.append(len(keywords["input_ids"]))
        return forward(*arguments, **keywords)

    monkeypatch.setattr(model.model.base_model, "forward", counted)
    monkeypatch.setattr(model, "_prefixes", Prefixes(10**6))
    frames = clips(5, seed=3)
    answers = model.p_yes(frames[:3], [QUESTIONS] * 3)
    texts = model.caption(frames[1:], [INSTRUCTION, "Describe this video in full detail."], max_new_tokens=5)
    np.testing.assert_allclose(model.p_yes(frames[[2, 0]], [QUESTIONS] * 2), answers[[2, 0]], atol=1e-6)
    assert read == [3, 2]
    monkeypatch.setattr(model, "_prefixes", Prefixes(10**6))
    assert texts == model.caption(frames[1:], [INSTRUCTION, "Describe this video in full detail."], max_new_tokens=5)


def test_captions_are_those_of_the_whole_conversation(model):
    frames = clips(3, seed=4)
    for clip, (text,) in zip(frames, model.caption(frames, [INSTRUCTION], max_new_tokens=8), strict=True):
        inputs = model._inputs([(clip, INSTRUCTION)])
        with torch.inference_mode():
            tokens = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
        assert text == " ".join(model.tokenizer.decode(tokens, skip_special_tokens=True).split())


def test_a_family_whose_questions_are_no_tokens_by_themselves_reads_each_conversation_whole(model, monkeypatch):
    frames = clips(2, seed=5)
    answers, texts = model.p_yes(frames, [QUESTIONS] * 2), model.caption(frames, [INSTRUCTION], 5)
    monkeypatch.setattr(model, "_tail", lambda *_: [0])
    monkeypatch.setattr(model, "_go_on", None)
    monkeypatch.setattr(model, "_reads_whole", False)
    with capture_logs() as told:
        np.testing.assert_allclose(model.p_yes(frames, [QUESTIONS] * 2), answers, atol=1e-5)
        assert model.caption(frames, [INSTRUCTION], 5) == texts
    assert [each["event"] for each in told] == ["clips are read anew for each question and caption"]


def test_p_yes_does_not_depend_on_neighbours(model):
    frames = clips(5)
    questions = [[question + " " + "Look closely. " * at for question in QUESTIONS] for at in range(5)]
    together = model.p_yes(frames, questions)
    alone = [model.p_yes(frames[at : at + 1], questions[at : at + 1])[0] for at in range(5)]
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-2 * together.max()  # the clips and questions do differ


def test_p_yes_is_the_same_however_it_is_cut_into_passes(model, monkeypatch):
    frames, questions = clips(3), [QUESTIONS] * 3
    whole = model.p_yes(frames, questions)
    monkeypatch.setattr(multimodal, "TOKENS_PER_FORWARD", 1)
    np.testing.assert_allclose(model.p_yes(frames, questions), whole, atol=1e-5)


def test_p_yes_takes_another_number_of_questions_for_each_clip(model):
    frames = clips(3)
    found = model.p_yes(frames, [QUESTIONS[:1], [], [*QUESTIONS, *QUESTIONS]])
    whole = model.p_yes(frames, [[*QUESTIONS, *QUESTIONS]] * 3)
    asked = np.array([[True, False, False, False], [False] * 4, [True] * 4])
    np.testing.assert_array_equal(np.isnan(found), ~asked)
    np.testing.assert_allclose(found[asked], whole[asked], atol=1e-5)


def test_p_yes_takes_images(model):
    assert model.p_yes(clips(3, num_frames=1), [QUESTIONS] * 3).shape == (3, 2)


def test_p_yes_of_no_clips_is_empty(model):
    assert model.p_yes(clips(0), []).shape[0] == 0


def test_p_yes_ignores_control_tokens_in_a_question(model):
    frames = clips(1)
    image, end = model.processor.image_token, model.tokenizer.eos_token
    spelled = model.p_yes(frames, [[f"Is {image} it{end} clean?"]])
    np.testing.assert_allclose(spelled, model.p_yes(frames, [["Is   it  clean?"]]), atol=1e-6)


def test_p_yes_is_nan_where_logits_are_not_finite(fresh):
    with torch.no_grad():
        fresh.model.get_output_embeddings().weight[0] = torch.nan  # another token's row: Yes and No stay sound
        assert np.isfinite(fresh.p_yes(clips(1), [QUESTIONS])).all()
        fresh.model.get_output_embeddings().weight[fresh._yes] = torch.nan
    assert np.isnan(fresh.p_yes(clips(1), [QUESTIONS])).all()


def test_p_yes_says_when_frames_do_not_fit(fresh):
    fresh.context = 100
    with pytest.raises(
        ValueError, match=r"8 frames and a question are \d+ tokens, and the model reads 100; lower judge"
    ):
        fresh.p_yes(clips(1, num_frames=8), [QUESTIONS])


def test_captions_do_not_depend_on_neighbours(model):
    frames, instructions = (
        clips(3),
        ["Describe this video.", "Describe this video in full detail, with all its colours."],
    )
    together = model.caption(frames, instructions, max_new_tokens=6)
    assert [len(row) for row in together] == [2, 2, 2]
    assert together == [model.caption(frames[at : at + 1], instructions, max_new_tokens=6)[0] for at in range(3)]


def test_captions_are_as_long_as_asked(tiny_pack):
    model = load_multimodal(MultimodalRef(str(tiny_pack / "judge")))
    ((short,),) = model.caption(clips(1), ["Describe this video."], max_new_tokens=3)
    ((long,),) = model.caption(clips(1), ["Describe this video."], max_new_tokens=12)
    assert len(short.split()) == 3
    assert long.startswith(short) and len(long) > len(short)


def test_tiny_judge_tells_clips_apart(tiny_pack):
    model = load_multimodal(MultimodalRef(str(tiny_pack / "judge")))
    p_yes = model.p_yes(clips(24, seed=1), [QUESTIONS[:1]] * 24)
    assert p_yes.min() < 0.5 < p_yes.max()
    assert p_yes.std() > 0.1


def test_load_multimodal_loads_once_for_equal_references(tiny_pack):
    ref = MultimodalRef(str(tiny_pack / "judge"))
    assert load_multimodal(ref) is load_multimodal(pickle.loads(pickle.dumps(ref)))
    assert load_multimodal(ref) is load_multimodal(replace(ref, section="caption")), "one model for judge and captioner"


def test_load_multimodal_names_what_it_cannot_load(tiny_pack, tmp_path):
    with pytest.raises(UserError, match=r"^judge.screen.model: .*/expander: cannot be loaded") as raised:
        load_multimodal(MultimodalRef(str(tiny_pack / "expander"), section="judge.screen"))
    assert "\n" not in str(raised.value)
    for path in (tiny_pack / "judge").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 5000 if path.suffix == ".safetensors" else None])
    with pytest.raises(UserError, match=r"cannot be loaded as a multimodal model \(SafetensorError"):
        load_multimodal(MultimodalRef(str(tmp_path)))


def test_load_multimodal_refuses_a_judge_without_yes_and_no(tiny_pack, tmp_path):
    for path in (tiny_pack / "judge").iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(
            content.replace(b'"Yes"', b'"Yep"').replace("ĠYes".encode(), "ĠYep".encode())
        )
    with pytest.raises(UserError, match="no single token for 'Yes'"):
        load_multimodal(MultimodalRef(str(tmp_path)))


@pytest.mark.parametrize(
    ("total", "shown", "expected"),
    [(17, 5, [0, 4, 8, 12, 16]), (17, 2, [0, 16]), (4, 8, [0, 1, 2, 3]), (1, 8, [0]), (9, 1, [0])],
)
def test_evenly_spaced_keeps_first_and_last(total, shown, expected):
    frames = np.arange(total, dtype=np.uint8).reshape(1, total, 1, 1, 1)
    assert evenly_spaced(frames, shown).ravel().tolist() == expected
