"""Make the pack's tokenizer and train its text encoder: UMT5, two layers, to tell what a prompt says.

    python -m models.pack.train.text [--minutes 20]

The encoder first learns to answer, from one learned query a question, which value each attribute of each figure has, or that
it was not said. The denoiser's training then goes on with it. Words outside the grammar become <unk>.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.pack.grammar import ATTRIBUTES, BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, abridge, sample_scenes
from models.pack.phrases import VOCABULARY, describe
from models.pack.train.loop import Training, arguments, set_up, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS = 48
"""Tokens of a prompt, padding included: the longest that `describe` makes has fewer."""
WIDTH = 96
SLOTS = 2
"""Figures asked about: the two of a shot, or those of two shots."""
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "motion": MOTIONS,
    "background": BACKGROUNDS,
}


def main() -> None:
    options = arguments(__doc__, steps=1_500, batch_size=64, learning_rate=2e-3).parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    encoder = build_encoder(tokenizer)
    model = _Asked(encoder).to(device)
    training = Training("text", model, options)

    def make(step: int) -> tuple[list[str], list[list[int]]]:
        rng = stream(options.seed, step)
        scenes = sample_scenes(rng, options.batch_size, split="train")
        scenes = [scene if rng.random() < 0.5 else abridge(scene, rng) for scene in scenes]
        return [describe(scene, rng) for scene in scenes], [_answers(scene) for scene in scenes]

    def loss(step: int, data: tuple[list[str], list[list[int]]]) -> dict[str, torch.Tensor]:
        prompts, answers = data
        logits = model(*tokens(tokenizer, prompts, device))
        target = torch.tensor(answers, device=device)
        each = [nn.functional.cross_entropy(one, target[:, at]) for at, one in enumerate(logits)]
        return {"answers": torch.stack(each).mean()}

    training.run(make, loss)
    model.load_state_dict(training.average.weights)
    folder = Path(options.folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or mark of the grammar, <unk> for all else; it closes with </s> as T5's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = sorted({piece for word in VOCABULARY for piece in word.replace("-", " - ").split()} | {".", "-"})
    vocabulary = {piece: at for at, piece in enumerate(["<pad>", "</s>", "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
        padding_side="right",
    )


def build_encoder(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=24,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def tokens(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, int64 [n, TOKENS], padded as WanPipeline pads them."""
    made = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return made.input_ids.to(device), made.attention_mask.to(device)


def embed(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the denoiser is given, [n, TOKENS, WIDTH]: zero where there is no token, as WanPipeline has it."""
    return encoder(ids, mask).last_hidden_state * mask[..., None]


class _Asked(nn.Module):
    """The encoder with one query and one classifier a question; its answers are thrown away after training."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.queries = nn.Parameter(0.1 * torch.randn(len(_questions()), WIDTH))
        self.heads = nn.ModuleList([nn.Linear(WIDTH, len(VALUES[name]) + 1) for name, _ in _questions()])

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        states = embed(self.encoder, ids, mask)
        weights = (states @ self.queries.T).masked_fill(mask[..., None] == 0, -torch.inf).softmax(dim=1)
        found = torch.einsum("ntq,ntd->nqd", weights, states)
        return [head(found[:, at]) for at, head in enumerate(self.heads)]


def _questions() -> list[tuple[str, int]]:
    return [(name, slot) for name in VALUES for slot in range(SLOTS)]


def _answers(scene: Scene) -> list[int]:
    """For each question the value's number, 0 for what was not said or is not there."""
    figures = scene.figures
    found = []
    for name, slot in _questions():
        if name in ATTRIBUTES:
            value = getattr(figures[slot], name) if slot < len(figures) else None
        else:
            value = scene.shots[slot].background if slot < len(scene.shots) else None
        found.append(0 if value is None else 1 + VALUES[name].index(value))
    return found


if __name__ == "__main__":
    main()
