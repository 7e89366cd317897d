"""The loaders, on tiny random checkpoints in the format of the real ones; the numbers against transformers' own way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import UserError
from models.pack.tiny import fill_weights
from models.pack.tiny_language import build_tokenizer
from models.scorers import text_boxes
from models.scorers.aesthetic import Aesthetic
from models.scorers.checkpoint import ScorerRef
from models.scorers.clip_match import ClipMatch
from models.scorers.flow import Flow, _neighbourhoods
from models.scorers.nsfw import Nsfw
from models.scorers.text_boxes import TextBoxes, boxes_of

SIDE = 16
HEAD = (24, 12, 6, 1)


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 5, 20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 20,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.pad_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=small | {"image_size": SIDE, "patch_size": 8},
        projection_dim=HEAD[0],
    )
    model = CLIPModel(config)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim:
            torch.nn.init.normal_(weight, std=0.2, generator=generator)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return str(folder)


def head_weights() -> dict[str, torch.Tensor]:
    """Numbered as in the published head: dropout stands between the linear layers."""
    generator, made = torch.Generator().manual_seed(0), {}
    for at, (wide, narrow) in enumerate(pairwise(HEAD)):
        made[f"layers.{2 * at}.weight"] = torch.randn(narrow, wide, generator=generator)
        made[f"layers.{2 * at}.bias"] = torch.randn(narrow, generator=generator)
    return made


@pytest.fixture(scope="module")
def aesthetic_folder(clip_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("aesthetic")
    for file in Path(clip_folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(head_weights(), folder / "head.safetensors")
    return str(folder)


def pooled(folder: str, images: list[np.ndarray]) -> torch.Tensor:
    """Unit image embeddings by transformers' own call."""
    from transformers import AutoProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        found = model.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)
    return torch.nn.functional.normalize(found, dim=-1)


def test_aesthetic_is_the_head_on_the_unit_embedding(aesthetic_folder: str, clips: np.ndarray) -> None:
    found = Aesthetic(ScorerRef(aesthetic_folder)).score(clips)
    images = [clip[at] for clip in clips for at in (0, 2, 4)]
    rated = pooled(aesthetic_folder, images)
    weights = head_weights()
    for at in (0, 2, 4):
        rated = rated @ weights[f"layers.{at}.weight"].T + weights[f"layers.{at}.bias"]
    assert found.dtype == np.float32 and found.shape == (3,)
    assert found == pytest.approx(rated.reshape(3, 3).mean(dim=1).numpy(), rel=1e-4)


def test_aesthetic_reads_a_head_in_the_models_own_file(
    aesthetic_folder: str, tmp_path: Path, clips: np.ndarray
) -> None:
    for file in Path(aesthetic_folder).iterdir():
        if file.name != "head.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    merged = load_file(tmp_path / "model.safetensors") | head_weights()
    save_file(merged, tmp_path / "model.safetensors", {"format": "pt"})
    one, other = (Aesthetic(ScorerRef(str(folder))).score(clips) for folder in (aesthetic_folder, tmp_path))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head: head.clear(), "no head that ends in one number"),
        (lambda head: head.update({"layers.0.weight": torch.zeros(12, 7)}), r"layers.0 of the head is \[12, 7\]"),
        (lambda head: head.pop("layers.2.bias"), "layers.2 of the head"),
        (lambda head: [head.pop(f"layers.4.{name}") for name in ("weight", "bias")], "no head that ends in one number"),
    ],
)
def test_aesthetic_refuses_a_head_that_does_not_fit(
    change: Any, said: str, aesthetic_folder: str, tmp_path: Path
) -> None:
    for file in Path(aesthetic_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    head = head_weights()
    change(head)
    save_file(head, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=said):
        Aesthetic(ScorerRef(str(tmp_path)))


def test_clip_match_is_the_cosine_of_both_embeddings(clip_folder: str, clips: np.ndarray) -> None:
    from transformers import AutoTokenizer, CLIPModel

    texts = ["a red circle", "a blue square moving left", "a"]
    clip = ClipMatch(ScorerRef(clip_folder))
    assert clip.images(clips) == pytest.approx(pooled(clip_folder, [each[2] for each in clips]).numpy(), abs=1e-5)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    with torch.inference_mode():
        said = [model.get_text_features(**tokenizer([text], return_tensors="pt")) for text in texts]
    said = [torch.nn.functional.normalize(getattr(one, "pooler_output", one), dim=-1)[0].numpy() for one in said]
    assert clip.texts(texts) == pytest.approx(np.stack(said), abs=1e-5), "alike alone and padded"
    assert clip.match(clips, texts) == pytest.approx(np.einsum("nd,nd->n", clip.images(clips), clip.texts(texts)))
    assert np.abs(clip.match(clips, texts)).max() <= 1
    assert clip.texts(["red circle " * 50]).shape == (1, HEAD[0])


def vit(folder: Path, labels: dict[int, str]) -> str:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**small, image_size=SIDE, patch_size=8, id2label=labels))
    fill_weights(model, "vit")
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return str(folder)


def test_nsfw_is_the_greatest_probability_of_three_frames(tmp_path: Path, clips: np.ndarray) -> None:
    from transformers import pipeline

    folder = vit(tmp_path, {0: "normal", 1: "nsfw"})
    found = Nsfw(ScorerRef(folder)).score(clips)
    from PIL import Image

    classify = pipeline("image-classification", folder)
    expected = [
        max(
            answer["score"]
            for at in (0, 2, 4)
            for answer in classify(Image.fromarray(clip[at]))
            if answer["label"] == "nsfw"
        )
        for clip in clips
    ]
    assert found == pytest.approx(np.array(expected), rel=1e-4)


def test_nsfw_refuses_a_classifier_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has the classes cat, dog; give a folder with"):
        Nsfw(ScorerRef(vit(tmp_path, {0: "cat", 1: "dog"})))


def test_text_boxes_are_read_off_a_map() -> None:
    found = np.zeros((64, 96), np.float32)
    found[20:28, 10:50] = 0.9
    found[40:60, 70:90] = 0.5  # marked, but not sure
    found[2:4, 2:90] = 0.9  # two rows: too low
    boxes = boxes_of(found, (128, 288))
    # It grows by 1.5 x 320 / 96 = 5 pixels of the map, and then by 2 down and by 3 across.
    assert [tuple(box[:4]) for box in boxes] == [(15, 30, 165, 66)]
    assert boxes[0].probability == pytest.approx(0.9)


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoModelForObjectDetection, PPOCRV5MobileDetConfig

    model = AutoModelForObjectDetection.from_config(PPOCRV5MobileDetConfig())
    fill_weights(model, "detector")
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    return str(folder)


def test_text_boxes_prepare_a_frame_as_the_detector_was_trained(detector_folder: str) -> None:
    frame = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8), (96, 64))
    found = TextBoxes(ScorerRef(detector_folder))
    seen: list[torch.Tensor] = []
    found.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["pixel_values"]), with_kwargs=True)
    likely = found.probabilities(frame)
    assert likely.shape == (64, 96) and likely.min() >= 0 and likely.max() <= 1
    blue_green_red = frame[..., ::-1].transpose(2, 0, 1) / 255
    imagenet = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    assert seen[0][0].numpy() == pytest.approx((blue_green_red - imagenet[0]) / imagenet[1], abs=1e-5)
    assert found.area(frame[None, None]).shape == (1,)


def test_text_area_is_what_boxes_cover_once(detector_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TextBoxes(ScorerRef(detector_folder))
    made = [text_boxes.Box(0, 0, 10, 10, 0.9), text_boxes.Box(5, 0, 15, 10, 0.9)]
    monkeypatch.setattr(found, "boxes", lambda frame: made)
    assert found.area(np.zeros((2, 3, 20, 30, 3), np.uint8)).tolist() == [0.25, 0.25]


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import PerceiverConfig, PerceiverForOpticalFlow

    config = PerceiverConfig(
        num_latents=4,
        d_latents=16,
        d_model=322,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        train_size=(16, 24),
    )
    model = PerceiverForOpticalFlow(config)
    fill_weights(model, "flow")
    folder = tmp_path_factory.mktemp("flow")
    model.save_pretrained(folder)
    return str(folder)


def test_flow_is_scaled_back_to_the_frame(flow_folder: str, clips: np.ndarray) -> None:
    found = Flow(ScorerRef(flow_folder))
    own = clips[0, :2].repeat(1, axis=0)
    small = np.stack([cv2.resize(frame, (24, 16)) for frame in own])
    one, twice = found.flow(small[0], small[1]), found.flow(*(small.repeat(2, axis=1).repeat(2, axis=2)))
    assert one.shape == (16, 24, 2) and np.abs(one).max() > 0
    assert twice == pytest.approx(2 * one, rel=0.02, abs=0.02 * float(np.abs(one).max()))
    motion = found.motion(clips, pairs=2)
    lengths = [np.linalg.norm(found.flow(clips[1, at], clips[1, at + 1]), axis=-1).mean() for at in (0, 3)]
    assert motion.shape == (3,) and motion[1] == pytest.approx(np.mean(lengths), rel=1e-5)
    assert found.motion(clips[:, :1]).tolist() == [0, 0, 0]


def test_flow_reads_the_eight_pixels_around_each() -> None:
    pixels = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    found = _neighbourhoods(pixels)
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    for row in range(3):
        for column in range(3):
            first = (3 * row + column) * 3
            assert np.array_equal(found[:, first : first + 3], padded[:, :, row : row + 4, column : column + 5])


@pytest.mark.parametrize("kind", [Aesthetic, ClipMatch, Nsfw, TextBoxes, Flow])
def test_a_folder_that_holds_no_such_model_is_a_users_mistake(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^score.nsfw.model: .*nowhere is no folder; give one with"):
        kind(ScorerRef(str(tmp_path / "nowhere"), key="score.nsfw.model"))
    with pytest.raises(UserError, match=r"cannot be loaded .*; give a folder with .*, weights in safetensors"):
        kind(ScorerRef(str(tmp_path)))


def test_pickles_are_not_loaded_and_missing_weights_are_seen(tmp_path: Path) -> None:
    folder = Path(vit(tmp_path / "vit", {0: "normal", 1: "nsfw"}))
    weights = load_file(folder / "model.safetensors")
    weights.pop("classifier.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights of its own model, 1 missing"):
        Nsfw(ScorerRef(str(folder)))
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="weights in safetensors"):
        Nsfw(ScorerRef(str(folder)))
