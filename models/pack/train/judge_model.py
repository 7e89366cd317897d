"""The pack's judge as a checkpoint: tokenizer, processor, Idefics3 model, and the heads that help it learn."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from models.pack.grammar import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES
from models.pack.phrases import VOCABULARY
from models.pack.train import questions
from models.pack.train.eyes import CONNECTOR, SHARED, VISION
from models.pack.train.judge_code import CODE, MERGED
from models.pack.train.questions import ATTRIBUTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FRAME_TOKENS = (VISION["image_size"] // VISION["patch_size"] // MERGED) ** 2
TEXT: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
}
EMBEDDED = 0.5
"""Spread of the words' embeddings at the start: about that of tokens' codes."""
REST = 0.3
"""Spread of a token's channels that tell nothing yet."""
STATE_LAYERS = (2, 4)
"""After so many layers a frame's last token tells the figures: first what and where they are, then how they move, which
takes comparing frames. The questions' upper layers can read it there."""
STATE = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "motion": MOTIONS}
SLOTS = 2
TRACKED = 6
"""Of each figure: x, y and the logarithm of its radius, and by how much each has changed since its shot began: from frame
to frame a figure moves less than a tower that is still learning can tell."""
CHANGES = 2.0
"""Unit of a change, in parts of that of the value."""

USER, ASSISTANT, END, PAD, UNKNOWN = "<|user|>", "<|assistant|>", "<end_of_utterance>", "<pad>", "<unk>"
IMAGE, FENCE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_utterance>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# ditmill shapes judge

Answers questions on clips of the shapes world with Yes or No, and captions them. Trained on rendered clips only.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar, of the questions and of the instructions; <unk> for all else. Case is lost."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
    said = [*sorted(VOCABULARY), questions.HEAD, questions.TAIL, questions.NO_ARTEFACTS, questions.MOTION_SMOOTH]
    said += [questions.SHORT, questions.DENSE, *questions.OTHER_HEADS, *questions.OTHER_CLEAN, *questions.OTHER_SMOOTH]
    said += [*questions.MEDIA, "yes no there is clip picture"]
    pieces = {piece for text in said for piece, _ in splitter.pre_tokenize_str(text.lower())} - {"{", "}", "prompt"}
    special = [PAD, UNKNOWN, USER, ASSISTANT, END, IMAGE, FENCE, GLOBAL]
    tokenizer = Tokenizer(
        models.WordLevel({piece: at for at, piece in enumerate([*special, *sorted(pieces)])}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, IMAGE, FENCE, GLOBAL],
        padding_side="left",
        model_max_length=TEXT["max_position_embeddings"],
        clean_up_tokenization_spaces=True,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    side = VISION["image_size"]
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": side},
        max_image_size={"longest_edge": side},
        do_image_splitting=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=FRAME_TOKENS, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast, eyes: Path | None = None) -> nn.ModuleDict:
    """The judge with random weights but for the tower, if `eyes.py` left one; and the heads that help it learn."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT, **ends, tie_word_embeddings=False),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=MERGED,
        tie_word_embeddings=False,
    )
    judge = Idefics3ForConditionalGeneration(config)
    nn.init.normal_(judge.get_input_embeddings().weight, std=EMBEDDED)
    if eyes is not None and eyes.exists():
        judge.model.vision_model.load_state_dict(Idefics3VisionTransformer.from_pretrained(eyes).state_dict())
    _connect(judge, eyes)
    width = TEXT["hidden_size"]
    told = SLOTS * sum(len(values) + 1 for values in STATE.values()) + len(BACKGROUNDS)
    heads = {f"{name}{at}": size for at in STATE_LAYERS for name, size in (("state", told), ("track", SLOTS * TRACKED))}
    heads["right"] = len(ATTRIBUTES)
    return nn.ModuleDict({"judge": judge, **{name: nn.Linear(width, size) for name, size in heads.items()}})


@torch.no_grad()
def _connect(judge: Any, eyes: Path | None) -> None:
    """Start the connector at the same projection for each of the patches that become one token: a sum over them.

    It tells the token's code in the first channels, if `eyes.py` learnt to, and little of anything else in the others.
    """
    projection = next(judge.model.connector.modality_projection.parameters())
    patches, width = MERGED**2, VISION["hidden_size"]
    shared = REST * torch.randn(len(projection), width) / (width * patches) ** 0.5
    if eyes is not None and (eyes / CONNECTOR).exists():
        shared[:CODE] = load_file(eyes / CONNECTOR)["code"] / SHARED
    projection.copy_(shared.repeat(1, patches))


def export(judge: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in float16, with its processor and chat template."""
    half = deepcopy(judge).eval().to(torch.float16)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(half.generation_config, name, getattr(tokenizer, name))
    half.save_pretrained(folder, safe_serialization=True)
    build_processor(tokenizer).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
