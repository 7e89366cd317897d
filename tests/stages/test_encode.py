from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from models.generator import GeneratorRef
from models.plan import SamplerPlan
from stages.batch import Batch, take
from stages.encode import LONGEST_PROMPT, EncodeText

Planned = Callable[..., Batch]
PLAN = SamplerPlan(num_inference_steps=2)


@pytest.fixture
def encode(tiny_pack: Path) -> EncodeText:
    stage = EncodeText((GeneratorRef(str(tiny_pack / "generator")),), PLAN, batch_size=8)
    stage.load()
    return stage


def test_encode_is_picklable_and_cheap_to_load_again(encode: EncodeText) -> None:
    again = pickle.loads(pickle.dumps(encode))
    assert again == encode
    again.load()


def test_encode_adds_conditions_of_one_length(encode: EncodeText, planned: Planned) -> None:
    result = encode(planned(8))
    assert {name for name in result if name.startswith("cond.")} == {
        "cond.prompt_embeds",
        "cond.negative_prompt_embeds",
    }
    assert result["cond.prompt_embeds"].shape == (8, 64, 32)
    assert result["cond.prompt_embeds"].dtype == np.float32
    assert set(result["error_type"]) == {""}


@pytest.mark.parametrize("rows", [[0], [2, 1, 0], [7, 3, 5, 1, 0, 2, 6, 4]])
def test_encode_gives_a_sample_the_same_bits_whatever_its_neighbours(
    rows: list[int], encode: EncodeText, planned: Planned
) -> None:
    batch = planned(8)
    whole = encode(batch)
    part = encode(take(batch, np.array(rows)))
    for name in ("cond.prompt_embeds", "cond.negative_prompt_embeds"):
        np.testing.assert_array_equal(part[name], whole[name][rows])


@pytest.mark.parametrize(
    ("prompt", "error_type"),
    [
        ("", "empty_prompt"),
        (" \n\t ", "empty_prompt"),
        ("a \udcff cat", "bad_text"),
        ("cat " * 25_000, "prompt_too_long"),
        ("c" * (LONGEST_PROMPT + 1), "prompt_too_long"),
    ],
)
def test_encode_fails_the_sample_and_not_its_neighbours(
    prompt: str, error_type: str, encode: EncodeText, planned: Planned
) -> None:
    well = encode(planned(3))
    result = encode(planned(3, prompt=["a red circle bouncing", prompt, "the sea"]))
    assert list(result["error_type"]) == ["", error_type, ""]
    assert result["error"][1]
    assert not result["cond.prompt_embeds"][1].any()
    np.testing.assert_array_equal(result["cond.prompt_embeds"][0], well["cond.prompt_embeds"][0])


@pytest.mark.parametrize(
    ("extra", "error_type", "words"),
    [
        ('{"bad_text": true}', "bad_text", "not valid UTF-8"),
        ('{"bad_input": "cat.png cannot be read"}', "bad_input", "cat.png cannot be read"),
        ('{"bad_text": "a column of the user\'s", "bad_input": null}', "", ""),
    ],
)
def test_encode_fails_what_the_records_say_is_bad(
    extra: str, error_type: str, words: str, encode: EncodeText, planned: Planned
) -> None:
    result = encode(planned(2, extra=[extra, ""]))
    assert list(result["error_type"]) == [error_type, ""]
    assert words in result["error"][0]


def test_encode_accepts_the_longest_prompt(encode: EncodeText, planned: Planned) -> None:
    assert set(encode(planned(1, prompt=["c" * LONGEST_PROMPT]))["error_type"]) == {""}


def test_encode_of_bad_samples_only_adds_nothing(encode: EncodeText, planned: Planned) -> None:
    result = encode(planned(2, prompt=["", ""]))
    assert list(result["error_type"]) == ["empty_prompt"] * 2
    assert not [name for name in result if name.startswith("cond.")]


def test_encode_leaves_its_input_alone(encode: EncodeText, planned: Planned) -> None:
    batch = planned(2, prompt=["", "a cat"])
    encode(batch)
    assert list(batch["error_type"]) == ["", ""]


def test_encode_without_guidance_needs_no_negative(tiny_pack: Path, planned: Planned) -> None:
    plan = SamplerPlan(num_inference_steps=2, guidance_scale=1.0)
    result = EncodeText((GeneratorRef(str(tiny_pack / "generator")),), plan, batch_size=2)(planned(2))
    assert [name for name in result if name.startswith("cond.")] == ["cond.prompt_embeds"]


def test_encode_fails_a_missing_first_frame(tiny_image_to_video: str, planned: Planned, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "frame.png"
    Image.new("RGB", (100, 80), (200, 30, 30)).save(picture)
    inputs = [json.dumps([{"role": "first_frame", "uri": str(uri)}]) for uri in (picture, tmp_path / "nothing.png")]
    stage = EncodeText((GeneratorRef(tiny_image_to_video),), PLAN, batch_size=4)
    result = stage(planned(2, inputs=inputs))
    assert list(result["error_type"]) == ["", "bad_input"]
    assert result["cond.image"].shape == (2, 64, 64, 3)
    assert result["cond.image"][0].mean(axis=(0, 1)).tolist() == [200, 30, 30]


def test_encode_does_not_open_the_input_of_a_sample_that_fails(tiny_image_to_video: str, planned: Planned) -> None:
    asked: list[str] = []

    class Counts(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

    with HTTPServer(("127.0.0.1", 0), Counts) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/frame.png"
        inputs = [json.dumps([{"role": "first_frame", "uri": uri}])] * 2
        stage = EncodeText((GeneratorRef(tiny_image_to_video),), PLAN, batch_size=4)
        extra = json.dumps({"bad_input": f"{uri} is outside of policy.endpoints"})
        refused = stage(planned(2, inputs=inputs, extra=[extra, extra]))
        assert set(refused["error"]) == {f"{uri} is outside of policy.endpoints"} and asked == []
        stage(planned(1, inputs=inputs[:1]))
        server.shutdown()
    assert asked != [], "else this test could not fail"


def test_a_prompt_with_more_scenes_than_blocks_fails_alone(tiny_pack: Path, planned: Planned) -> None:
    plan = SamplerPlan(num_inference_steps=2, blocks=(1, 1), scenes=("|", 2.0))
    stage = EncodeText((GeneratorRef(str(tiny_pack / "generator")),), plan, batch_size=8)
    batch = planned(3)
    batch["num_frames"][:] = 9  # 3 latent frames are 2 blocks
    batch["prompt"][:] = ["a red circle", "a red circle | a blue star", "a | b | c"]
    result = stage(batch)
    assert list(result["error_type"]) == ["", "", "too_many_scenes"]
    assert result["error"][2] == "the prompt has 3 scenes and the video 2 blocks"
    assert result["cond.prompt_embeds"].shape[:2] == (3, 2)
    assert list(result["cond.scenes"]) == [1, 2, 0]
