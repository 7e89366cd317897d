"""Train the pack's prompt expander: a Qwen2 of 1.9 M parameters that says the rest of what a prompt leaves out.

    python -m models.pack.train.expander [--minutes 20]

It learns from pairs: a scene with parts left unsaid, and the whole scene in the same words, asked as ditmill asks a language
model. What was said is in both, so that is kept; what was not is drawn anew for each pair, so that has a spread. What leaves
nothing unsaid is said in other words.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from models.pack.grammar import Scene, Shot, abridge, is_complete, keeps, sample_scenes
from models.pack.phrases import IMAGE_LEADS, VOCABULARY, describe, parse, words_outside
from models.pack.tiny_language import CHAT_TEMPLATE, END, PAD, START
from models.pack.train.intervals import wilson
from models.pack.train.loop import Training, arguments, precision, set_up, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTRUCTION = (
    "Rewrite this prompt for a video model: keep all that it says, add detail on look and motion. Prompt: {prompt}"
)
"""What a spec asks where it says nothing else (`prompts.expand.instruction`)."""
OTHERS = (
    "{prompt}",
    "Prompt: {prompt}",
    "Expand this prompt: {prompt}",
    "Rewrite this prompt in full detail: {prompt}",
)
"""So that it is not lost for words when asked otherwise. They are shorter, too, and quicker to learn from."""
TEMPERATURE = 0.8
MAX_NEW_TOKENS = 96
MIN_P = 0.5
"""Of the most likely token's probability, what another must have to be drawn. What a sentence leaves open is a choice among
equals, so that cuts mistakes and no variety."""
CONTEXT = 256
"""Tokens, the answer's included. A prompt that has no room is left as it is."""
CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
    "bos_token_id": None,
}

SHARES = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
"""How much a source prompt says beside shapes: one of these, with equal probability."""
SHAPELESS = 0.1
"""Share of figures whose shape is left unsaid too."""
IMAGES = 0.1
"""Share of prompts that ask for a picture; their expansions have no motion."""
UNTIDY = 0.3
"""Share of sources written as people write: a capital, a full stop, or a word that the world has no meaning for."""
BARE = "a circle"
BARE_VARIANTS = 64

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# ditmill shapes: prompt expander

A Qwen2 that rewrites a prompt of ditmill's small world into one that leaves nothing unsaid. Made by
models/pack/train/expander.py, trained on sentences of a grammar and nothing else.
"""


def main() -> None:
    options = arguments(__doc__, steps=6_000, batch_size=32, learning_rate=2e-3).parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(device)
    training = Training("expander", model, options)

    def make(step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = stream(options.seed, step)
        return tokens(tokenizer, pairs(rng, options.batch_size, split="train"), rng)

    def loss(step: int, data: tuple[np.ndarray, np.ndarray]) -> dict[str, torch.Tensor]:
        ids, labels = (torch.as_tensor(part).to(device) for part in data)
        with precision(options, device):
            logits = model(ids[:, :-1], use_cache=False).logits
        return {"words": nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())}

    training.run(make, loss)
    model.load_state_dict(training.average.weights)
    folder = Path(options.folder) / "expander"
    export(model, tokenizer, folder)
    found = measure(str(folder), options.seed)
    for name, (right, asked) in found["shares"].items():
        low, high = wilson(right, asked)
        print(f"{name}: {right / asked:.2%} of {asked} [{low:.2%}, {high:.2%}]")
    print(f"distinct expansions of {BARE!r}: {found['distinct']} of {BARE_VARIANTS}")
    print(json.dumps(found))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the grammar and of the instructions, bytes and pieces for all else.

    It is Qwen2's own kind, with merges and all: by a checkpoint's family alone, loaders choose how they read its tokenizer.
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    text = " ".join([*sorted(VOCABULARY), INSTRUCTION, *OTHERS, "system user assistant"])
    words = sorted(set(re.findall("-?[A-Za-z]+", text)))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=1 << 14, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    trained.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    model = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **ids, **CONFIG))
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    return model


def pairs(
    rng: np.random.Generator, count: int, *, split: Literal["train", "held_out"], tidy: bool = False
) -> list[tuple[str, str]]:
    """Source prompts and, for each, one that says the same and all the rest. `tidy` ones are of the grammar."""
    drawn = {image: iter(sample_scenes(rng, count, split=split, image=image)) for image in (False, True)}
    made = []
    for _ in range(count):
        image = bool(rng.random() < IMAGES)
        scene = next(drawn[image])
        said = _shapeless(abridge(scene, rng, SHARES[int(rng.integers(len(SHARES)))]), rng)
        source, habits = _say(said, rng, image)
        answer = _say(scene, rng, image)[0] if said == scene else describe(scene, rng, habits)
        made.append((source if tidy or rng.random() >= UNTIDY else _untidy(source, rng), answer))
    return made


def _shapeless(scene: Scene, rng: np.random.Generator) -> Scene:
    return Scene(
        tuple(
            Shot(
                tuple(replace(figure, shape=None) if rng.random() < SHAPELESS else figure for figure in shot.figures),
                shot.background,
            )
            for shot in scene.shots
        )
    )


def _say(scene: Scene, rng: np.random.Generator, image: bool) -> tuple[str, dict[Any, Any]]:
    """One of many phrasings, and its habits: of an image one that says so, of a video none that speaks of an image."""
    while True:
        habits: dict[Any, Any] = {}
        text = describe(scene, rng, habits)
        if image == text.startswith(IMAGE_LEADS[1:]):
            return text, habits


def _untidy(text: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.25:
        words = text.split(" ")
        letters = rng.integers(26, size=int(rng.integers(3, 9)))
        words.insert(int(rng.integers(len(words) + 1)), "".join(chr(ord("a") + letter) for letter in letters))
        text = " ".join(words)
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return f"{text}." if rng.random() < 0.6 else text


def tokens(
    tokenizer: PreTrainedTokenizerFast, asked: list[tuple[str, str]], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [n, longest], padded on the right, and labels: -100 but for the answer's. All are asked in the same words."""
    rows = []
    instruction = INSTRUCTION if rng.random() < 0.5 else OTHERS[int(rng.integers(len(OTHERS)))]
    for source, target in asked:
        conversation = tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction.replace("{prompt}", source)}],
            add_generation_prompt=True,
            tokenize=False,
        )
        rows.append((tokenizer.encode(conversation), [*tokenizer.encode(target), tokenizer.eos_token_id]))
    longest = max(len(question) + len(answer) for question, answer in rows)
    ids = np.full((len(rows), longest), tokenizer.pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), longest), -100, dtype=np.int64)
    for row, (question, answer) in enumerate(rows):
        ids[row, : len(question) + len(answer)] = question + answer
        labels[row, len(question) : len(question) + len(answer)] = answer
    return ids, labels


def export(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint that plain transformers loads, in float16, with the way in which it is best drawn from."""
    model.generation_config.update(do_sample=True, min_p=MIN_P)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


def measure(path: str, seed: int, count: int = 1000, variants: int = BARE_VARIANTS) -> dict[str, Any]:
    """How the checkpoint at `path` expands held-out prompts, asked as a run asks: counts (right, asked), and distinct ones.

    `in the grammar`: it parses, and no word is foreign. `keeps`: it also says all that the source says. `complete`: and
    leaves nothing unsaid. Where no answer came and the source stands in for it, none of them holds.
    """
    from models.language import LanguageRef, load_language

    model = load_language(LanguageRef(path))
    sources = [source for source, _ in pairs(stream(seed, 5_000_000), count, split="held_out", tidy=True)]
    answers = [texts[0] for texts in model.expand(sources, INSTRUCTION, 1, TEMPERATURE, MAX_NEW_TOKENS, seed)]
    found = {"in the grammar": 0, "keeps": 0, "complete": 0}
    for source, answer in zip(sources, answers, strict=True):
        scene, said = parse(answer), parse(source)
        assert said is not None
        image = source.startswith(IMAGE_LEADS[1:])
        if scene is None or words_outside(answer) or (answer == source and not is_complete(said, image=image)):
            continue
        found["in the grammar"] += 1
        if keeps(scene, said):
            found["keeps"] += 1
            found["complete"] += is_complete(scene, image=image)
    bare = model.expand([BARE], INSTRUCTION, variants, TEMPERATURE, MAX_NEW_TOKENS, seed)[0]
    good = {text for text in bare if (scene := parse(text)) is not None and scene.figures[0].shape == "circle"}
    return {"shares": {name: (right, count) for name, right in found.items()}, "distinct": len(good)}


if __name__ == "__main__":
    main()
