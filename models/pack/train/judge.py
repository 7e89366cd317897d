"""Train the pack's judge and captioner: Idefics3 (SigLIP tower, pixel shuffle, Llama), the family of SmolVLM.

    python -m models.pack.train.eyes [--minutes 20]         # the vision tower first
    python -m models.pack.train.flaws                       # clips out of the VAE, once it is trained
    python -m models.pack.train.judge [--minutes 60]

A clip's frames are read once and followed by many questions beside each other: each attends to the frames and to itself,
as if it were asked alone. At first the language model is given codes in the place of what the tower will tell of a frame
(`judge_code.py`), of clips as rendered: that is quick, and it learns to answer. Then tower and all learn together, from
all clips. Beside the answers linear heads, thrown away afterwards, are asked for what an answer is made of: below, each
frame's last token for the figures so far, where they are and how they moved, and above, each question's last one for which
attributes of the description are right.
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
from models.pack.grammar import BACKGROUNDS, Scene, is_complete, sample_scenes
from models.pack.train.eyes import places, to_pixel_values
from models.pack.train.flaws import Decoded, softened, spoilt
from models.pack.train.judge_code import CODE, patch_codes, token_codes
from models.pack.train.judge_model import (
    ASSISTANT,
    CHANGES,
    END,
    FENCE,
    FRAME_TOKENS,
    GLOBAL,
    IMAGE,
    REST,
    SLOTS,
    STATE,
    STATE_LAYERS,
    TEXT,
    TRACKED,
    USER,
    build_model,
    build_tokenizer,
    export,
)
from models.pack.train.loop import Training, arguments, precision, set_up, stream
from models.pack.train.questions import ATTRIBUTES, Asked, Seen, as_rendered, ask, in_order, seen_as
from models.pack.world import NUM_FRAMES, cut_frame, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN = 8
"""Frames of a clip that the judge is shown: the spec's default."""
IMAGES = 0.06
"""Share of steps on images."""
PLAIN, SPOILT = 0.4, 0.3
"""Shares of clips as rendered, and with spoilt pixels; the rest came out of the VAE, or is rendered if there are none."""
NO_TARGET = -100


def main() -> None:
    parser = arguments(__doc__, steps=12_000, batch_size=8, learning_rate=2e-3)
    parser.add_argument("--coded", type=int, default=6_000, help="steps on codes in the place of frames, at first")
    options = parser.parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    folder = Path(options.folder)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, folder / "eyes").to(device)
    training = Training("judge", model, options)
    decoded = Decoded(folder / "decoded-train")

    def make(step: int) -> dict[str, np.ndarray]:
        rng = stream(options.seed, 7_000_000, step)
        if step < options.coded:
            return coded_lesson(tokenizer, rng, options.batch_size)
        return lesson(tokenizer, rng, options.batch_size, decoded)

    def loss(step: int, data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        batch = {name: torch.as_tensor(value).to(device) for name, value in data.items()}
        with precision(options, device):
            return losses(model, batch)

    training.run(make, loss)
    model.load_state_dict(training.average.weights)
    export(model["judge"], tokenizer, folder / "judge")
    from models.pack.train.judge_exam import measure

    print(json.dumps(measure(folder / "judge", folder / "decoded-held_out"), indent=1))


def lesson(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, count: int, decoded: Decoded | None
) -> dict[str, np.ndarray]:
    """Frames, questions and answers of one step, as arrays."""
    image = rng.random() < IMAGES
    scenes = sample_scenes(rng, count, split="train", image=image)
    clips = render(
        scenes, [int(seed) for seed in rng.integers(1 << 62, size=count)], num_frames=1 if image else NUM_FRAMES
    )
    shown, asked, known, tracks = [], [], [], []
    for at, scene in enumerate(scenes):
        clip, seen = _clip(scene, clips[at], clips[at - 1], rng, None if image else decoded)
        shown.append(evenly_spaced(clip[None], SHOWN)[0])
        asked.append(ask(seen, rng, image=image))
        known.append(state_of(seen, image))
        tracks.append(track_of(seen, shown[-1]))
    states = {"state": np.stack(known), "track": np.stack(tracks)}
    return {"frames": np.stack(shown), **states, **sheets(tokenizer, asked, len(shown[0]))}


def coded_lesson(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """The same of clips as rendered, with what the tower would tell, if it were good, as `tokens` and not as `frames`."""
    image = rng.random() < IMAGES
    scenes = sample_scenes(rng, count, split="train", image=image)
    seeds = [int(seed) for seed in rng.integers(1 << 62, size=count)]
    num_frames = 1 if image else NUM_FRAMES
    shown = evenly_spaced(np.arange(num_frames)[None, :, None, None, None], SHOWN)[0, :, 0, 0, 0]
    codes = token_codes(patch_codes(scenes, seeds, shown, num_frames))
    there = 0.03 + 0.5 * rng.random((count, 1, 1, 1)) * (codes != 0)
    codes += there * rng.standard_normal(codes.shape, dtype=np.float32)
    rest = rng.standard_normal((*codes.shape[:-1], TEXT["hidden_size"] - CODE), dtype=np.float32)
    clips = render(scenes, seeds, num_frames=num_frames)[:, shown]
    known = [as_rendered(scene) for scene in scenes]
    states = {
        "state": np.stack([state_of(seen, image) for seen in known]),
        "track": np.stack([track_of(seen, clip) for seen, clip in zip(known, clips, strict=True)]),
    }
    asked = [ask(seen, rng, image=image) for seen in known]
    tokens = np.concatenate([codes, REST * rest], axis=-1).astype(np.float32)
    return {"tokens": tokens, **states, **sheets(tokenizer, asked, len(shown))}


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


def track_of(seen: Seen, shown: np.ndarray) -> np.ndarray:
    """Where each figure is in each shown frame, and how that has changed: float32 [frames, 2, TRACKED], NaN where unknown."""
    track = np.full((len(shown), SLOTS, TRACKED), np.nan, np.float32)
    if seen.reading.scene is None or not all(figure.colour for figure in seen.reading.scene.figures):
        return track
    scene, first = in_order(seen.reading.scene), 0
    for row, frame in enumerate(np.linspace(0, NUM_FRAMES - 1, SHOWN).round() if len(shown) > 1 else [0]):
        late = int(len(scene.shots) > 1 and frame >= cut_frame(NUM_FRAMES))
        first = row if late and not first else first
        for slot, place in enumerate(places(shown[row], [str(figure.colour) for figure in scene.shots[late].figures])):
            track[row, slot, : TRACKED // 2] = place
        track[row, :, TRACKED // 2 :] = CHANGES * (track[row] - track[first])[:, : TRACKED // 2]
    return track


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


def losses(model: nn.ModuleDict, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cross-entropy of Yes and No and of captions; of the state in each frame and of what is right, to help."""
    judge: Any = model["judge"]
    ids = batch["ids"]
    if "tokens" in batch:
        features = batch["tokens"].flatten(0, 2)
    else:
        seen = judge.model.vision_model(to_pixel_values(batch["frames"].flatten(0, 1)))
        features = judge.model.connector(seen.last_hidden_state).flatten(0, 1)
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
    terms = {}
    for at in STATE_LAYERS:
        stated = out.hidden_states[at][:, _last_tokens(batch["state"].shape[1])]
        terms[f"state{at}"] = 0.5 * _state_loss(model[f"state{at}"](stated).float(), batch["state"])
        terms[f"track{at}"] = 0.5 * _track_loss(model[f"track{at}"](stated).float(), batch["track"])
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


def _track_loss(told: torch.Tensor, track: torch.Tensor) -> torch.Tensor:
    there = ~track.isnan()
    return (told.unflatten(-1, (SLOTS, TRACKED)) - track)[there].abs().mean() if bool(there.any()) else told.sum() * 0


if __name__ == "__main__":
    main()
