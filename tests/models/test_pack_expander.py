"""The prompt expander's lessons say what they should, and are asked as a run asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.language import LanguageRef, load_language
from models.pack.grammar import is_complete, is_held_out, keeps
from models.pack.phrases import IMAGE_LEADS, parse, words_outside
from models.pack.train import expander
from models.pack.train.loop import stream
from pipelines.sections import Expand


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("expander")
    torch.manual_seed(0)
    tokenizer = expander.build_tokenizer()
    expander.export(expander.build_model(tokenizer), tokenizer, folder)
    return str(folder)


def test_it_is_taught_with_what_a_spec_asks_by_default():
    asked = Expand()
    assert (asked.instruction, asked.temperature, asked.max_new_tokens) == (
        expander.INSTRUCTION,
        expander.TEMPERATURE,
        expander.MAX_NEW_TOKENS,
    )


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_answer_says_everything_and_keeps_what_its_source_says(split: str):
    bare = whole = 0
    for source, answer in expander.pairs(stream(0, 1), 600, split=split, tidy=True):
        said, scene = parse(source), parse(answer)
        assert said is not None and scene is not None and keeps(scene, said)
        image = source.startswith(IMAGE_LEADS[1:])
        assert is_complete(scene, image=image)
        assert image or is_held_out(scene) == (split == "held_out")
        bare += len(source.split()) <= 2
        whole += is_complete(said, image=image)
    assert bare > 15 and whole > 60


def test_some_sources_are_written_as_people_write():
    sources = [source for source, _ in expander.pairs(stream(0, 2), 400, split="train")]
    assert any(source.endswith(".") for source in sources) and any(source[0].isupper() for source in sources)
    assert any(words_outside(source) for source in sources)


def test_a_lesson_asks_as_a_run_asks_and_scores_the_answer_alone(untrained: str):
    tokenizer = expander.build_tokenizer()
    asked_by_a_run = []
    for lesson in range(8):
        asked = expander.pairs(stream(0, 3, lesson), 6, split="train")
        ids, labels = expander.tokens(tokenizer, asked, stream(0, 4, lesson))
        for (source, answer), row, scored in zip(asked, ids, labels, strict=True):
            start, end = np.flatnonzero(scored != -100)[[0, -1]]
            assert tokenizer.decode(scored[start : end + 1]) == answer + tokenizer.eos_token
            assert (row[start : end + 1] == scored[start : end + 1]).all()
            assert (row[end + 1 :] == tokenizer.pad_token_id).all()
            wanted = load_language(LanguageRef(untrained))._tokens(expander.INSTRUCTION, source)
            asked_by_a_run.append(row[:start].tolist() == wanted)
    assert 6 <= sum(asked_by_a_run) < 48  # the rest is asked in other words


def test_what_was_said_is_said_again_in_the_same_words_unless_all_was_said():
    kept = changed = 0
    for source, answer in expander.pairs(stream(0, 6), 400, split="train", tidy=True):
        said = parse(source)
        if is_complete(said, image=source.startswith(IMAGE_LEADS[1:])):
            changed += source != answer
        else:
            words = [word for word in source.split() if word not in ("a", "an", "shape", "figure", "of", "image")]
            kept += set(words) <= set(answer.split()) | {"video", "clip", "animation"}
    assert changed > 50 and kept > 200


def test_every_word_of_the_grammar_is_one_token():
    tokenizer = expander.build_tokenizer()
    for _, answer in expander.pairs(stream(0, 5), 100, split="train"):
        pieces = answer.replace("-", " -").replace(",", " ,").replace(";", " ;").split()
        assert len(tokenizer.encode(answer)) == len(pieces)


def test_the_checkpoint_is_small_half_precision_and_plain(untrained: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(untrained)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert sum(weight.numel() for weight in model.parameters()) < 3_000_000
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    assert sum(file.stat().st_size for file in Path(untrained).iterdir()) < 6_000_000
    chat = [{"role": "user", "content": "a circle"}]
    asked = AutoTokenizer.from_pretrained(untrained).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|im_start|>user\na circle<|im_end|>\n<|im_start|>assistant\n"


def test_measuring_random_weights_finds_nothing_right(untrained: str):
    found = expander.measure(untrained, seed=0, count=3, variants=2)
    assert found == {"shares": {"in the grammar": (0, 3), "keeps": (0, 3), "complete": (0, 3)}, "distinct": 0}
