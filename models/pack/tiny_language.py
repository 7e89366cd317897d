"""The tiny pack's judge and prompt expander: complete checkpoints with random weights.

The judge is a LLaVA (SigLIP tower, Qwen2 text model), the expander a Qwen2: formats that both transformers and vLLM load.
Nothing in them is trained: P(yes) only differs from clip to clip, and what they write is a salad of the words below.
Weights come from numpy's Philox, so that the same files are written on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_SIZE = 64
PATCH_SIZE = 16
HIDDEN_SIZE = 64
CONTEXT = 32768

ATTENTIVE = {f"language_model.layers.{layer}.self_attn.{part}_proj": 4.0 for layer in (0, 1) for part in "qv"}
"""Gains of the judge's weights: with sharper attention its answer depends more on the frames."""

ANSWERS_KEY = 1247
ANSWERS_SCALE = 0.3125
"""Drawn so that the default rubric accepts about 60% of the tiny generator's clips: a random number's worth."""

IMAGE, START, END, PAD = "<image>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"

WORDS = """
Yes No a an the one two three small large big bright dark red green blue yellow orange purple white black grey
circle square triangle star ball cube cat dog bird fish horse person child tree flower river mountain ocean beach
city street house car boat train cloud sun moon sky grass snow rain fire light shadow background foreground scene
moves moving slowly quickly left right up down across around over under behind above below near far inside through
bouncing rotating rolling sliding falling rising floating flying walking running turning standing still sits looks
camera pans zooms tracking shot close wide view soft warm cold smooth steady texture detail colour shape motion
video image clip frame prompt describe question answer sentence with and of in on to from is are this that its it
while then as at by for does show what said
""".split()  # noqa: SIM905
"""What the models can say, beside single bytes: each word is one token, with and without a space before it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: {task}
---

# ditmill tiny {part}

Randomly initialised and untrained. It exists so that every stage runs offline on a CPU; its answers mean nothing.
"""


def build_judge(folder: Path) -> None:
    """Write a LLaVA checkpoint (about 1 MB, float32) with its processor: judge and captioner of `pack://tiny`."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from models.pack.tiny import fill_weights

    tokenizer = build_tokenizer()
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text_config(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    fill_weights(model, "judge", ATTENTIVE)
    _set_answers(model, tokenizer)
    _speak_words(model, tokenizer)
    model.generation_config.repetition_penalty = 1.3
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    _save(folder, model, processor, tokenizer)
    (folder / "README.md").write_text(CARD.format(task="image-text-to-text", part="judge and captioner"))


def build_expander(folder: Path) -> None:
    """Write a Qwen2 checkpoint (under 1 MB, float32) with a chat template: the prompt expander of `pack://tiny`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from models.pack.tiny import fill_weights

    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(Qwen2Config(**_text_config(tokenizer)))
    fill_weights(model, "expander")
    _speak_words(model, tokenizer)
    _save(folder, model, tokenizer, tokenizer)
    (folder / "README.md").write_text(CARD.format(task="text-generation", part="prompt expander"))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and each of `WORDS` is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS, *(f"Ġ{word}" for word in WORDS)]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, START, END, IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, IMAGE],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def _text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _set_answers(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give Yes and No rows in `lm_head` that are large, so that P(yes) spreads over (0, 1)."""
    import torch

    yes, no = np.random.Generator(np.random.Philox(key=ANSWERS_KEY)).standard_normal((2, HIDDEN_SIZE), dtype=np.float32)
    with torch.no_grad():
        for word, row in (("Yes", yes), ("No", no)):
            for token in (word, f"Ġ{word}"):
                weight = torch.from_numpy(row * np.float32(ANSWERS_SCALE))
                model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = weight


def _speak_words(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let generated text be words and an end, not loose bytes."""
    spoken = {tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in WORDS if word not in ("Yes", "No")}
    silent = set(range(len(tokenizer))) - spoken - {tokenizer.eos_token_id}
    model.generation_config.suppress_tokens = sorted(silent)


def _save(folder: Path, model: Any, *parts: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = model.config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = model.config.get_text_config().pad_token_id
    model.save_pretrained(folder, safe_serialization=True)
    for part in parts:
        part.save_pretrained(folder)
