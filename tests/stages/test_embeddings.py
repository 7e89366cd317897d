"""Texts of a batch as WriteShards writes them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from infra.commit import Committer, Part
from infra.schema import EMBEDDINGS
from infra.shard import read_arrays, safetensors_of
from infra.storage import Storage
from infra.tables import Table
from models.families import family_of
from models.text import TextEncoding, padded_text, text_of
from stages import embeddings
from stages.batch import Batch, texts
from stages.embeddings import texts_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ENCODING = TextEncoding("ab" * 32, "Wan text-to-video", 64, "float32")


def batch_of(*prompts: str) -> Batch:
    """Samples of these prompts, all with one empty negative prompt; of an empty prompt, a failed one."""
    file = safetensors_of({"prompt_embeds": np.ones((3, 8), np.float32)}, "float16", ENCODING.as_metadata())
    count = len(prompts)
    return {
        "prompt": texts(list(prompts)),
        "negative_prompt": texts([""] * count),
        "text": texts([file] * count),
        "text_id": texts([ENCODING.text_id(prompt, False) for prompt in prompts]),
        "negative_text": texts([file] * count),
        "negative_text_id": texts([ENCODING.text_id("", True)] * count),
        "error_type": texts(["" if prompt else "empty_prompt" for prompt in prompts]),
    }


def written(storage: Storage, *prompts: str) -> list[str]:
    found = texts_of(batch_of(*prompts), storage, "r1", NOW, "float16", "none")
    assert [row["tensors"][0]["member"] for row in found.rows] == [name for name, _ in found.members]
    return [row["text"] for row in found.rows]


def test_a_batch_writes_each_of_its_texts_once(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert sorted(written(storage, "a cat", "a dog", "a cat", "")) == ["", "a cat", "a dog"]
    found = texts_of(batch_of("a cat"), storage, "r1", NOW, "float16", "none")
    assert [(row["tokens"], row["negative"], row["family"]) for row in found.rows if row["text"]] == [
        (3, False, "Wan text-to-video")
    ]


def test_only_committed_texts_are_known(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(embeddings, "LOOK_SECONDS", 0.0)
    storage = Storage(str(tmp_path))
    assert sorted(written(storage, "a cat")) == ["", "a cat"]
    assert sorted(written(storage, "a cat", "a dog")) == ["", "a cat", "a dog"]
    import pyarrow as pa

    from infra.commit import write_part

    committer = Committer(Table(storage, "embeddings"), "r1", knows_all=True)
    rows = texts_of(batch_of("a cat"), storage, "r1", NOW, "float16", "none").rows
    part: Part = write_part(storage, "embeddings/r1-0.parquet", pa.Table.from_pylist(rows, EMBEDDINGS))
    committer.commit([part])
    assert written(storage, "a cat", "a dog") == ["a dog"]
    assert written(storage, "a cat") == []


def test_ids_tell_prompts_from_negative_ones_and_encoders_apart() -> None:
    ids = {ENCODING.text_id("a", False), ENCODING.text_id("a", True), ENCODING.text_id("b", False)}
    ids.add(TextEncoding("cd" * 32, "Wan text-to-video", 64, "float32").text_id("a", False))
    ids.add(TextEncoding("ab" * 32, "Wan text-to-video", 32, "float32").text_id("a", False))
    assert len(ids) == 5 and all(len(text_id) == 32 for text_id in ids)
    assert ENCODING.text_id("a cat", False) == "6899f5414d18b0ebfd47c9eded0a1d55"


def test_padding_is_cut_where_nothing_is_lost() -> None:
    embeds = np.zeros((1, 6, 4), np.float32)
    embeds[0, :3] = 1.0
    mask = np.array([[1, 1, 0, 0, 0, 0]])
    wan, flux, qwen = (family_of(name) for name in ("WanPipeline", "FluxPipeline", "QwenImagePipeline"))
    assert wan is not None and flux is not None and qwen is not None
    conditions = {"prompt_embeds": embeds, "negative_prompt_embeds": np.zeros_like(embeds)}
    kept = text_of(wan, conditions, 0, negative=False)
    np.testing.assert_array_equal(padded_text(kept, 6)["prompt_embeds"], embeds[0])
    assert len(kept["prompt_embeds"]) == 3
    assert len(text_of(wan, conditions, 0, negative=True)["prompt_embeds"]) == 1  # of no tokens
    pooled = {"prompt_embeds": embeds, "pooled_prompt_embeds": np.ones((1, 4), np.float32)}
    assert {name: value.shape for name, value in text_of(flux, pooled, 0, negative=False).items()} == {
        "prompt_embeds": (6, 4),
        "pooled_prompt_embeds": (4,),
    }
    masked = text_of(qwen, {"prompt_embeds": embeds, "prompt_embeds_mask": mask}, 0, negative=False)
    assert {name: value.shape for name, value in masked.items()} == {
        "prompt_embeds": (2, 4),
        "prompt_embeds_mask": (2,),
    }
    assert text_of(flux, pooled, 0, negative=True) == {}


def test_files_of_texts_hold_several_arrays() -> None:
    arrays = {"prompt_embeds": np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4), "mask": np.array([True, False])}
    read = read_arrays(safetensors_of(arrays, "float32", {}))
    np.testing.assert_array_equal(read["prompt_embeds"], arrays["prompt_embeds"])
    assert read["mask"].dtype == np.int64 and read["mask"].tolist() == [1, 0]
