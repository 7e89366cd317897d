from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import UserError
from infra.media import decode, split_strip
from infra.schema import FAILURES, SAMPLES
from infra.storage import Storage
from stages.batch import Batch, jsons, take, texts
from stages.write import GeneratorFacts, WriteShards, split_of

PLAN = json.dumps({"latent_layout": "C T H W", "latents": {"scaling": "none"}, "shift": 3.0})
ASKED = json.dumps({"shift": None})
MAY_DIFFER = {"run_id", "created_at", "cost", "node", "device", "layout_json", "code_version"}
T, H, W = 5, 32, 48


def make_batch(num_frames: int = T) -> Batch:
    """Five samples: accepted, rejected, failed, accepted, accepted."""
    n = 5
    frames = np.zeros((n, num_frames, H, W, 3), np.uint8)
    for at in range(n):
        for t in range(num_frames):
            frames[at, t, 8:20, 4 + 4 * t : 16 + 4 * t] = (40 * at + 40, 200, 255 - 40 * at)
    verdicts = ["accepted", "rejected", "", "accepted", "accepted"]
    return {
        "batch_index": np.full(n, 7, np.int64),
        "sample_id": texts([f"v1-{at:032x}" for at in (9, 8, 7, 6, 5)]),
        "noise_key": texts([f"{at:032x}" for at in range(n)]),
        "prompt_id": texts([f"p{at}" for at in range(n)]),
        "source_prompt": texts([f"source {at}" for at in range(n)]),
        "prompt": texts([f"a red circle ünïcode {at}" for at in range(n)]),
        "negative_prompt": texts([""] * n),
        "inputs": jsons(
            [[{"role": "first_frame", "uri": "x.png", "sha256": "00", "start": None, "end": None}], [], [], [], []]
        ),
        "licence": texts(["cc0", "", "", "", ""]),
        "tags": jsons([["a", "b"], [], [], [], []]),
        "extra": jsons([{"variant": 1, "phash": "00ff", "source": {"page": at}} for at in range(n)]),
        "sample_index": np.arange(n),
        "seed": np.full(n, 2**63 - 1),
        "height": np.full(n, H),
        "width": np.full(n, W),
        "num_frames": np.full(n, num_frames),
        "fps": np.full(n, 8.0),
        "attempt": np.full(n, 2),
        "generator": np.zeros(n, np.int64),
        "nfe": np.full(n, 40),
        "plan_json": texts([PLAN] * n),
        "error_type": texts(["", "", "nan_latents", "", ""]),
        "error": texts(["", "", "latents: expected finite, found NaN", "", ""]),
        "error_stage": texts(["", "", "sample", "", ""]),
        "latents": np.random.default_rng(0).standard_normal((n, 4, 2, 4, 6)).astype(np.float32),
        "frames": frames,
        "scores": jsons([[{"name": "sharpness", "value": 3}, {"name": "motion", "value": 0.5}] for _ in range(n)]),
        "verdict": texts(verdicts),
        "reasons": jsons([["motion 0.02 < 0.25"] if verdict == "rejected" else [] for verdict in verdicts]),
        "caption": texts([f"caption {at}" if verdict == "accepted" else "" for at, verdict in enumerate(verdicts)]),
        "captions": jsons(
            [
                [{"style": "short", "language": "en", "scene": 0, "text": f"caption {at}", "model": "m"}]
                if verdict == "accepted"
                else []
                for at, verdict in enumerate(verdicts)
            ]
        ),
        "cost": jsons([[{"stage": "sample", "accelerator_seconds": 0.0, "cpu_seconds": 1.5}] for _ in range(n)]),
    }


def make_stage(root: Path, **settings: object) -> WriteShards:
    adapter = {"uri": "lora.safetensors", "sha256": "aa", "weight": 0.5}
    facts = GeneratorFacts("pack://tiny", "ab" * 32, "cd" * 16, ASKED, 20, 5.0, (adapter,))
    stage = WriteShards(
        storage=Storage(str(root)),
        run_id="r1",
        recipe="synthetic",
        generators=(facts,),
        layout_json='{"batch_size": 5}',
        judge="judge",
        rubric="default",
        code_version="0",
        tensors={"latents": "float16"},
    )
    return replace(stage, **settings)


def run(stage: WriteShards, batch: Batch) -> dict:
    out = stage(batch)
    assert list(out) == ["result"] and len(out["result"]) == 1
    return json.loads(out["result"][0])


def table(stage: WriteShards, result: dict, name: str) -> pa.Table:
    parts = [part for part in result["parts"] if part["table"] == name]
    assert len(parts) == 1
    data = stage.storage.read_bytes(parts[0]["path"])
    assert len(data) == parts[0]["nbytes"]
    found = pq.read_table(io.BytesIO(data))
    assert found.num_rows == parts[0]["rows"]
    return found


def rows(stage: WriteShards, result: dict) -> dict[str, dict]:
    return {row["prompt_id"]: row for row in table(stage, result, "samples").to_pylist()}


def member_names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_write_keeps_the_facts_that_a_sample_was_asked_about(tmp_path):
    stage, batch = make_stage(tmp_path), make_batch()
    facts = [{"question": "Is it red?", "needs": [], "p_yes": 0.25}]
    batch["decomposed"] = texts([json.dumps(facts) if at == 0 else "" for at in range(len(batch["prompt"]))])
    found = rows(stage, run(stage, batch))
    assert json.loads(found["p0"]["extra_json"])["decomposed"] == facts
    assert all("decomposed" not in json.loads(found[key]["extra_json"]) for key in ("p1", "p3"))


def test_write_keeps_what_techniques_saved_beside_a_users_columns(tmp_path):
    stage, batch = make_stage(tmp_path), make_batch()
    batch["extra"] = texts([json.dumps({"text_id": "mine", "accelerated": "no"})] * len(batch["prompt"]))
    batch["accelerated"] = texts([json.dumps({"skipped": 0.5})] * len(batch["prompt"]))
    found = rows(stage, run(stage, batch))
    extra = json.loads(found["p0"]["extra_json"])
    assert (extra["text_id"], extra["accelerated"]) == ("mine", {"skipped": 0.5})


def test_write_puts_each_row_where_its_verdict_says(tmp_path):
    stage, batch = make_stage(tmp_path), make_batch()
    result = run(stage, batch)
    assert (result["batch_index"], result["accepted"], result["rejected"], result["failed"]) == (7, 3, 1, 1)
    assert result["ledger"] == []
    found = rows(stage, result)
    assert {key: row["verdict"] for key, row in found.items()} == {
        "p0": "accepted",
        "p1": "rejected",
        "p3": "accepted",
        "p4": "accepted",
    }
    row = found["p0"]
    assert row["adapters"] == [{"uri": "lora.safetensors", "sha256": "aa", "weight": 0.5}]
    assert row["inputs"][0]["role"] == "first_frame" and row["tags"] == ["a", "b"] and row["seed"] == 2**63 - 1
    assert row["scores"] == [{"name": "sharpness", "value": 3.0}, {"name": "motion", "value": 0.5}]
    assert json.loads(row["extra_json"]) == {"variant": 1, "phash": "00ff", "source": {"page": 0}, "licence": "cc0"}
    assert row["split"] == split_of("source 0") and row["nfe"] == 40 and row["device"] == "cpu"
    assert found["p1"]["reasons"] == ["motion 0.02 < 0.25"]
    failure = table(stage, result, "failures").to_pylist()[0]
    assert (failure["prompt_id"], failure["stage"], failure["error_type"], failure["attempt"]) == (
        "p2",
        "sample",
        "nan_latents",
        2,
    )
    assert failure["cost"] == [{"stage": "sample", "accelerator_seconds": 0.0, "cpu_seconds": 1.5}]
    assert sum(stage.storage.size(name) for name in result["media"]) == result["media_nbytes"]


def test_write_parts_have_the_schema_of_their_table(tmp_path):
    stage = make_stage(tmp_path)
    result = run(stage, make_batch())
    assert table(stage, result, "samples").schema.equals(SAMPLES)
    assert table(stage, result, "failures").schema.equals(FAILURES)
    column = pq.ParquetFile(tmp_path / result["parts"][0]["path"]).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"


def test_write_references_resolve_to_what_they_say(tmp_path):
    from safetensors.numpy import load

    stage, batch = make_stage(tmp_path), make_batch()
    for row in rows(stage, run(stage, batch)).values():
        for reference in row["media"] + row["tensors"]:
            start, nbytes = reference["offset"], reference["nbytes"]
            data = stage.storage.read_bytes(reference["shard"], start, start + nbytes)
            assert hashlib.sha256(data).hexdigest() == reference["sha256"]
            with tarfile.open(tmp_path / reference["shard"]) as tar:
                assert tar.extractfile(reference["member"]).read() == data
        if row["verdict"] == "accepted":
            at = int(row["prompt_id"][1:])
            video, latents = row["media"][0], row["tensors"][0]
            data = stage.storage.read_bytes(video["shard"], video["offset"], video["offset"] + video["nbytes"])
            assert (video["role"], video["mime"]) == ("video", "video/mp4")
            assert np.abs(decode(data, "mp4").astype(int) - batch["frames"][at]).mean() < 3
            data = stage.storage.read_bytes(latents["shard"], latents["offset"], latents["offset"] + latents["nbytes"])
            assert (latents["dtype"], latents["shape"], latents["layout"]) == ("float16", [4, 2, 4, 6], "C T H W")
            np.testing.assert_array_equal(load(data)["latents"], batch["latents"][at].astype(np.float16))


@pytest.mark.parametrize(
    ("keep", "media", "tensors", "suffixes"),
    [
        ("preview", ["preview"], [], ["webp"]),
        ("latents", [], ["latents"], ["safetensors"]),
        ("media", ["video"], [], ["mp4"]),
        ("none", [], [], []),
    ],
)
def test_write_keeps_of_rejected_what_is_asked(tmp_path, keep, media, tensors, suffixes):
    stage = make_stage(tmp_path, keep_rejected=keep, tensors={})
    result = run(stage, make_batch())
    row = rows(stage, result)["p1"]
    assert [reference["role"] for reference in row["media"]] == media
    assert [reference["role"] for reference in row["tensors"]] == tensors
    shards = [name for name in result["media"] if name.startswith("rejected/r1/")]
    assert len(shards) == bool(suffixes)
    assert (member_names(tmp_path / shards[0]) if shards else []) == [
        f"{row['sample_id']}.{suffix}" for suffix in suffixes
    ]
    assert rows(stage, result)["p0"]["tensors"] == []


def test_write_preview_shows_four_frames_of_the_rejected(tmp_path):
    stage = make_stage(tmp_path)
    preview = rows(stage, run(stage, make_batch()))["p1"]["media"][0]
    data = stage.storage.read_bytes(preview["shard"], preview["offset"], preview["offset"] + preview["nbytes"])
    assert split_strip(data, T).shape == (4, H, W, 3)


def test_write_of_images_uses_the_image_format(tmp_path):
    stage = make_stage(tmp_path, image_format="webp", tensors={})
    result = run(stage, make_batch(num_frames=1))
    reference = rows(stage, result)["p0"]["media"][0]
    assert (reference["role"], reference["mime"]) == ("image", "image/webp")
    assert {name.split(".")[1] for name in member_names(tmp_path / result["media"][0])} == {"webp", "json"}


def test_write_again_gives_equal_rows_and_media_under_other_names(tmp_path):
    first, second = make_stage(tmp_path), make_stage(tmp_path, run_id="r2", layout_json="{}", code_version="1")
    a, b = run(first, make_batch()), run(second, make_batch())
    again = run(first, make_batch())
    names = (
        [part["path"] for result in (a, b, again) for part in result["parts"]]
        + a["media"]
        + b["media"]
        + again["media"]
    )
    assert len(set(names)) == len(names)
    for one, other in zip(a["media"], b["media"], strict=True):
        assert first.storage.read_bytes(one) == second.storage.read_bytes(other)
    rows_a, rows_b = rows(first, a), rows(second, b)
    for key, row in rows_a.items():
        for column, value in row.items():
            if column in ("media", "tensors"):
                place = {"shard", "offset"}
                assert [{k: v for k, v in item.items() if k not in place} for item in value] == [
                    {k: v for k, v in item.items() if k not in place} for item in rows_b[key][column]
                ]
            elif column not in MAY_DIFFER:
                assert value == rows_b[key][column], column


def test_write_in_a_fresh_process_gives_the_same_tars(tmp_path):
    stage = make_stage(tmp_path / "here")
    here = run(stage, make_batch())
    program = (
        "import importlib.util, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('written', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"stage = module.make_stage(pathlib.Path({str(tmp_path / 'there')!r}))\n"
        "print(stage(module.make_batch())['result'][0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "5"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    there = json.loads(ran.stdout)
    for one, other in zip(here["media"], there["media"], strict=True):
        assert (tmp_path / "here" / one).read_bytes() == (tmp_path / "there" / other).read_bytes()


def test_write_turns_text_that_is_no_unicode_into_a_failure(tmp_path):
    stage, batch = make_stage(tmp_path), make_batch()
    batch["prompt"][0] = "broken \ud800 text"
    batch["extra"][3] = json.dumps({"note": "\udfff"})
    batch["error"][2] = "saw \ud800"
    result = run(stage, batch)
    assert (result["accepted"], result["rejected"], result["failed"]) == (1, 1, 3)
    failures = {row["prompt_id"]: row for row in table(stage, result, "failures").to_pylist()}
    assert failures["p0"]["error_type"] == failures["p3"]["error_type"] == "bad_text"
    assert failures["p0"]["stage"] == "write" and failures["p0"]["prompt"] == "broken ? text"
    assert failures["p0"]["error"].startswith("prompt: expected valid Unicode")
    assert failures["p2"]["error"] == "saw ?"


def test_write_turns_what_cannot_be_encoded_into_failures(tmp_path):
    stage, batch = make_stage(tmp_path), make_batch()
    batch["scores"][0] = '[{"name": "motion", "value": NaN}]'
    batch["latents"][3] = 1e6
    result = run(stage, batch)
    failures = {row["prompt_id"]: row["error_type"] for row in table(stage, result, "failures").to_pylist()}
    assert failures == {"p0": "bad_number", "p2": "nan_latents", "p3": "bad_latents"}
    assert result["accepted"] == 1


def test_write_without_a_described_plan_keeps_the_one_asked_for(tmp_path):
    stage, batch = make_stage(tmp_path), make_batch()
    batch["plan_json"][0] = ""
    found = rows(stage, run(stage, batch))
    assert (found["p0"]["plan_json"], found["p0"]["tensors"][0]["layout"]) == (ASKED, "")
    assert (found["p3"]["plan_json"], found["p3"]["tensors"][0]["layout"]) == (PLAN, "C T H W")


@pytest.mark.parametrize(
    ("settings", "key"),
    [({}, "output.tensors"), ({"tensors": {}, "keep_rejected": "latents"}, "output.keep_rejected")],
)
def test_write_tells_the_user_whose_pipeline_gives_no_latents(tmp_path, settings, key):
    batch = make_batch()
    del batch["latents"]
    with pytest.raises(UserError, match=f"{key}: pack://tiny runs whole and gives no latents"):
        make_stage(tmp_path, **settings)(batch)
    assert run(make_stage(tmp_path, tensors={}), batch)["accepted"] == 3


def test_write_of_odd_sized_video_fails_those_samples_only(tmp_path):
    stage, batch = make_stage(tmp_path, tensors={}), make_batch()
    batch["frames"] = batch["frames"][:, :, :31]
    result = run(stage, batch)
    assert (result["accepted"], result["rejected"], result["failed"]) == (0, 1, 4)
    assert "expected even height and width, found 31x48" in str(table(stage, result, "failures")["error"])


def test_write_of_a_batch_that_failed_before_it_had_frames(tmp_path):
    stage, batch = make_stage(tmp_path), take(make_batch(), np.array([2, 2]))
    for column in ("frames", "latents", "scores", "verdict", "reasons", "caption", "captions", "nfe"):
        del batch[column]
    batch["ledger"] = jsons([[{"samples": 3}], []])
    result = run(stage, batch)
    assert result["media"] == [] and [part["table"] for part in result["parts"]] == ["failures"]
    assert result["failed"] == 2 and result["ledger"] == [{"samples": 3}]


def test_write_refuses_a_live_sample_without_a_verdict(tmp_path):
    batch = make_batch()
    batch["verdict"][0] = ""
    with pytest.raises(ValueError, match="expected verdict accepted or rejected, found ''"):
        make_stage(tmp_path)(batch)


def test_write_lets_a_storage_error_through_unchanged(tmp_path):
    (tmp_path / "media").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        make_stage(tmp_path)(make_batch())
    assert not list(tmp_path.rglob("*.parquet"))


def test_write_shards_are_read_by_webdataset(tmp_path):
    import webdataset

    stage = make_stage(tmp_path)
    result = run(stage, make_batch())
    samples = list(webdataset.WebDataset(str(tmp_path / result["media"][0]), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"v1-{at:032x}" for at in (5, 6, 9)]
    for sample in samples:
        assert {key for key in sample if not key.startswith("__")} == {"json", "mp4", "safetensors"}
        said = json.loads(sample["json"])
        assert said["sample_id"] == sample["__key__"] and said["fps"] == 8.0 and said["captions"][0]["style"] == "short"
        assert not MAY_DIFFER & set(said)


def test_write_shards_and_parts_are_read_by_hf_datasets(tmp_path):
    import datasets

    stage = make_stage(tmp_path / "data")
    result = run(stage, make_batch())
    cache = str(tmp_path / "cache")
    shard = str(tmp_path / "data" / result["media"][0])
    media = datasets.load_dataset("webdataset", data_files=shard, split="train", cache_dir=cache)
    media = media.cast_column("mp4", datasets.Video(decode=False))
    assert media["json"][0]["prompt"] == "a red circle ünïcode 4"
    assert decode(media["mp4"][0]["bytes"], "mp4").shape == (T, H, W, 3)
    part = str(tmp_path / "data" / result["parts"][0]["path"])
    samples = datasets.load_dataset("parquet", data_files=part, split="train", cache_dir=cache)
    assert len(samples) == 4 and samples[0]["media"][0]["role"] == "video"


def test_split_keeps_two_percent_for_validation():
    prompts = [f"prompt {at}" for at in range(20_000)]
    held = sum(split_of(prompt) == "validation" for prompt in prompts)
    assert abs(held - 400) < 4 * (20_000 * 0.02 * 0.98) ** 0.5
    assert split_of("prompt \ud800") in ("train", "validation")
