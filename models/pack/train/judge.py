"""Train the pack's judge and captioner: Idefics3 (SigLIP tower, pixel shuffle, Llama), the family of SmolVLM.

    python -m models.pack.train.eyes [--minutes 20]         # the vision tower first
    python -m models.pack.train.flaws                       # clips out of the VAE, once it is trained
    python -m models.pack.train.judge [--minutes 60]

A clip's frames are read once and followed by many questions beside each other: each attends to the frames and to itself,
as if it were asked alone. Beside the answers three linear heads, thrown away afterwards, are asked for what an answer is made
of: after two layers each frame's last token for the figures so far, and each question's last one for which attributes of the
description are right.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from models.multimodal import evenly_spaced
from models.pack.grammar import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, is_complete, sample_scenes
from models.pack.phrases import VOCABULARY
from models.pack.train import questions
from models.pack.train.eyes import VISION, to_pixel_values
from models.pack.train.flaws import Decoded, softened, spoilt
from models.pack.train.loop import Training, arguments, precision, set_up, stream
from models.pack.train.questions import ATTRIBUTES, Asked, Seen, as_rendered, ask, in_order, seen_as
from models.pack.world import NUM_FRAMES, cut_frame, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN = 8
"""Frames of a clip that the judge is shown: the spec's default."""
MERGED = 4
"""Patches across and along that become one token: four tokens a frame."""
FRAME_TOKENS = (VISION["image_size"] // VISION["patch_size"] // MERGED) ** 2
TEXT: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
}
EMBEDDED = 0.5
"""Spread of the words' embeddings at the start: about that of what the tower's tokens become."""
STATE_LAYER = 2
"""After so many layers a frame's last token knows the figures so far, for the questions' layers to read."""
STATE = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "motion": MOTIONS}
SLOTS = 2

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

IMAGES = 0.06
"""Share of steps on images."""
PLAIN, SPOILT = 0.4, 0.3
"""Shares of clips as rendered, and with spoilt pixels; the rest came out of the VAE, or is rendered if there are none."""
NO_TARGET = -100


def main() -> None:
    parser = arguments(__doc__, steps=4_000, batch_size=12, learning_rate=1.5e-3)
    parser.add_argument("--silent", type=int, default=400, help="steps on twice the clips without questions, at first")
    parser.add_argument("--frozen", type=int, default=2_000, help="steps before the tower is trained too")
    options = parser.parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    folder = Path(options.folder)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, folder / "eyes").to(device)
    training = Training("judge", model, options)
    decoded = Decoded(folder / "decoded-train")

    def make(step: int) -> dict[str, np.ndarray]:
        silent = step < options.silent
        rng = stream(options.seed, 7_000_000, step)
        return lesson(tokenizer, rng, options.batch_size * (2 if silent else 1), decoded, silent=silent)

    def loss(step: int, data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        batch = {name: torch.as_tensor(value).to(device) for name, value in data.items()}
        with precision(options, device):
            return losses(model, batch, frozen=step < options.frozen)

    training.run(make, loss)
    model.load_state_dict(training.average.weights)
    export(model["judge"], tokenizer, folder / "judge")
    from models.pack.train.judge_exam import measure

    print(json.dumps(measure(folder / "judge", folder / "decoded-held_out"), indent=1))


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
    _pool(judge)
    width = TEXT["hidden_size"]
    told = SLOTS * sum(len(values) + 1 for values in STATE.values()) + len(BACKGROUNDS)
    return nn.ModuleDict({"judge": judge, "state": nn.Linear(width, told), "right": nn.Linear(width, len(ATTRIBUTES))})


@torch.no_grad()
def _pool(judge: Any) -> None:
    """Start the connector at the same projection for each of the patches that become one token: a sum over them.

    What is learnt of a figure in one place then holds in every other; left to chance, each place would be learnt anew.
    """
    projection = next(judge.model.connector.modality_projection.parameters())
    patches, width = MERGED**2, VISION["hidden_size"]
    shared = torch.randn(len(projection), width) / (width * patches) ** 0.5
    projection.copy_(shared.repeat(1, patches))


def lesson(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    count: int,
    decoded: Decoded | None,
    *,
    silent: bool = False,
) -> dict[str, np.ndarray]:
    """Frames, questions and answers of one step, as arrays; `silent`: frames alone."""
    image = rng.random() < IMAGES
    scenes = sample_scenes(rng, count, split="train", image=image)
    clips = render(
        scenes, [int(seed) for seed in rng.integers(1 << 62, size=count)], num_frames=1 if image else NUM_FRAMES
    )
    shown, asked, known = [], [], []
    for at, scene in enumerate(scenes):
        clip, seen = _clip(scene, clips[at], clips[at - 1], rng, None if image else decoded)
        shown.append(evenly_spaced(clip[None], SHOWN)[0])
        asked.append([] if silent else ask(seen, rng, image=image))
        known.append(state_of(seen, image))
    return {"frames": np.stack(shown), "state": np.stack(known), **sheets(tokenizer, asked, len(shown[0]))}


def _clip(
    scene: Scene, clip: np.ndarray, other: np.ndarray, rng: np.random.Generator, decoded: Decoded | None
) -> tuple[np.ndarray, Seen]:
    drawn = rng.random()
    if len(clip) > 1 and drawn < SPOILT:
        made = spoilt(clip, other, rng)
        return made, seen_as(made, scene)
    if decoded is not None and decoded.frames and drawn >= SPOILT + PLAIN:
        at = int(rng.integers(len(decoded.frames)))
        return decoded.frames[at], decoded.seen[at]
    return (softened(clip, rng) if rng.random() < 0.5 else clip), as_rendered(scene)


def state_of(seen: Seen, image: bool) -> np.ndarray:
    """What is seen in each shown frame, int64 [frames, 2 x 4 + 1]: number of the value + 1, 0 for no figure or none said."""
    shown = np.zeros(1, int) if image else np.linspace(0, NUM_FRAMES - 1, SHOWN).round().astype(int)
    told = np.full((len(shown), SLOTS * len(STATE) + 1), NO_TARGET)
    if seen.reading.scene is None or not is_complete(seen.reading.scene, image=image):
        return told
    scene = in_order(seen.reading.scene)
    for row, frame in enumerate(shown):
        shot = scene.shots[-1 if frame >= cut_frame(NUM_FRAMES) else 0]
        values = [
            0
            if slot >= len(shot.figures) or not (value := getattr(shot.figures[slot], name))
            else 1 + all_.index(value)
            for slot in range(SLOTS)
            for name, all_ in STATE.items()
        ]
        told[row] = [*values, BACKGROUNDS.index(shot.background)]  # type: ignore[arg-type]
    return told


@cache
def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def sheets(tokenizer: PreTrainedTokenizerFast, asked: list[list[Asked]], num_frames: int) -> dict[str, np.ndarray]:
    """All questions of each clip behind its frames, in one row of tokens a clip: int64 [n, L] unless said otherwise.

    positions: as if each question were asked alone. visible: bool [n, L, L], what each token may attend to. target: the
    token to say next, NO_TARGET for none. right: float32 [n, L, 6], NaN where nothing is asked. decides: bool, Yes or No.
    """
    rows = [_sheet(tokenizer, each, num_frames) for each in asked]
    length = max(len(row["ids"]) for row in rows)
    made = {
        "ids": np.full((len(rows), length), tokenizer.pad_token_id),
        "positions": np.zeros((len(rows), length), int),
        "visible": np.broadcast_to(np.eye(length, dtype=bool), (len(rows), length, length)).copy(),
        "target": np.full((len(rows), length), NO_TARGET),
        "right": np.full((len(rows), length, len(ATTRIBUTES)), np.nan, np.float32),
        "decides": np.zeros((len(rows), length), bool),
    }
    for at, row in enumerate(rows):
        for name, value in row.items():
            part = slice(len(row["ids"]))
            made[name][(at, part, part) if name == "visible" else (at, part)] = value
    return made


def _sheet(tokenizer: PreTrainedTokenizerFast, asked: list[Asked], num_frames: int) -> dict[str, np.ndarray]:
    frame = _ids(tokenizer, FENCE + GLOBAL + IMAGE * FRAME_TOKENS + FENCE)
    prefix = (*_ids(tokenizer, USER), *(frame * num_frames))
    ids, positions = list(prefix), list(range(len(prefix)))
    # A part is a run of tokens that follows another: the frames, a head, a question. `owner` names each token's part.
    owner, heads = [0] * len(prefix), {"": 0}
    parents: list[tuple[int, ...]] = [()]
    targets: list[tuple[int, int]] = []
    rights: list[tuple[int, tuple[bool | None, ...]]] = []
    decides: list[int] = []

    def add(tokens: tuple[int, ...], parent: int) -> int:
        part = len(parents)
        parents.append((parent, *parents[parent]))
        start = 1 + max(position for position, of in zip(positions, owner, strict=True) if of == parent)
        ids.extend(tokens)
        positions.extend(range(start, start + len(tokens)))
        owner.extend([part] * len(tokens))
        return part

    for one in asked:
        if one.head not in heads:
            heads[one.head] = add(_ids(tokenizer, one.head), 0)
        answer = _ids(tokenizer, one.answer)
        question = (*_ids(tokenizer, one.text), *_ids(tokenizer, END + ASSISTANT))
        short = len(answer) == 1  # Yes or No is not read again, so that nothing has to follow it
        add(question if short else (*question, *answer), heads[one.head])
        said = len(ids) - (0 if short else len(answer)) - 1
        if short:
            targets.append((said, answer[0]))
            decides.append(said)
            rights.append((said, one.right))
        else:
            targets.extend((said + at, token) for at, token in enumerate((*answer, tokenizer.eos_token_id)))
    part = np.asarray(owner)
    below = np.asarray([[a == b or b in parents[a] for b in range(len(parents))] for a in range(len(parents))])
    target, right = np.full(len(ids), NO_TARGET), np.full((len(ids), len(ATTRIBUTES)), np.nan, np.float32)
    deciding = np.zeros(len(ids), bool)
    for at, token in targets:
        target[at] = token
    for at, each in rights:
        right[at] = [np.nan if good is None else good for good in each]
    deciding[decides] = True
    return {
        "ids": np.asarray(ids),
        "positions": np.asarray(positions),
        "visible": below[part[:, None], part[None, :]] & np.tri(len(ids), dtype=bool),
        "target": target,
        "right": right,
        "decides": deciding,
    }


def losses(model: nn.ModuleDict, batch: dict[str, torch.Tensor], *, frozen: bool) -> dict[str, torch.Tensor]:
    """Cross-entropy of Yes and No and of captions; of the state in each frame and of what is right, to help."""
    judge: Any = model["judge"]
    frames, ids = batch["frames"], batch["ids"]
    with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
        pixels = to_pixel_values(frames.flatten(0, 1).cpu()).to(ids.device)
        seen = judge.model.vision_model(pixels).last_hidden_state
    features = judge.model.connector(seen).flatten(0, 1)
    embedded = judge.get_input_embeddings()(ids)
    places = (ids == judge.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(places, features.to(embedded.dtype))
    out = judge.model.text_model(
        inputs_embeds=embedded,
        attention_mask=batch["visible"][:, None],
        position_ids=batch["positions"],
        use_cache=False,
        output_hidden_states=True,
    )
    stated = out.hidden_states[STATE_LAYER][:, _last_tokens(frames.shape[1])]
    terms = {"state": _state_loss(model["state"](stated).float(), batch["state"])}
    if not bool(batch["decides"].any()):
        return terms
    last = out.last_hidden_state
    said = batch["target"] != NO_TARGET
    each = nn.functional.cross_entropy(judge.lm_head(last[said]).float(), batch["target"][said], reduction="none")
    decides = batch["decides"][said]
    terms["answers"] = each[decides].mean()
    if not bool(decides.all()):
        terms["captions"] = each[~decides].mean()
    right = batch["right"]
    asked = ~right.isnan()
    logits = model["right"](last)[asked].float()
    terms["right"] = 0.5 * nn.functional.binary_cross_entropy_with_logits(logits, right[asked])
    return terms


def _last_tokens(num_frames: int) -> list[int]:
    """Where each frame's closing token stands."""
    return [(FRAME_TOKENS + 3) * (at + 1) for at in range(num_frames)]


def _state_loss(told: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    known = state[..., 0] != NO_TARGET
    if not bool(known.any()):
        return told.sum() * 0
    told, state = told[known], state[known]
    sizes = [len(values) + 1 for _ in range(SLOTS) for values in STATE.values()] + [len(BACKGROUNDS)]
    each = [nn.functional.cross_entropy(logits, state[:, at]) for at, logits in enumerate(told.split(sizes, dim=-1))]
    return torch.stack(each).mean()


def export(judge: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in float16, with its processor and chat template."""
    from copy import deepcopy

    half = deepcopy(judge).eval().to(torch.float16)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(half.generation_config, name, getattr(tokenizer, name))
    half.save_pretrained(folder, safe_serialization=True)
    build_processor(tokenizer).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


if __name__ == "__main__":
    main()
