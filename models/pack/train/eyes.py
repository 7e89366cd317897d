"""Train the judge's vision tower: each patch learns to tell what figure it is part of. Ahead of `judge.py`.

    python -m models.pack.train.eyes [--minutes 20]

A tower that only ever hears Yes or No learns shapes last and slowly. Here every patch that shows some of a figure answers
with the figure's shape, colour, radius, centre and turn, and every patch with the background, all read off rendered
pixels. One more head, what a patch adds to its token (`judge_code.py`), becomes the judge's connector; the others are thrown
away afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from models.pack.geometry import OUTLINES
from models.pack.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene, sample_scenes
from models.pack.train.judge_code import CODE, PATCH, patch_codes, token_codes
from models.pack.train.loop import Training, arguments, precision, set_up, stream
from models.pack.world import FRAME, PALETTE, cut_frame, render

VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": FRAME,
    "patch_size": PATCH,
}
FRAMES_A_CLIP = 4
KEPT = 24
"""Patches of a frame that a step trains on: those that show something and a few others. The rest would cost and not teach."""
LEAST_COVERED = 4.0
"""Pixels of a figure in a patch that answers for it."""
GRID = 12
"""Samples, across and along, of a figure's outline at its own size."""
HEADS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "background": len(BACKGROUNDS),
    "place": 3,
    "turn": 2,
    "outline": GRID * GRID,
    "mask": PATCH * PATCH,
    "code": CODE,
}
SHARED = 4.0
"""The last head tells a patch's code times this."""
MASK_LAYER = 2
"""After so many layers a patch tells which of its own pixels the figure covers, whatever the colours."""
STEPS = (((1, 0), (0, 1), (-1, 0), (0, -1)), ((1, 1), (-1, 1), (-1, -1), (1, -1)))
"""Neighbours that the heads of even and of odd layers start by looking at."""
SHARP = 1.7
"""How sharply they look there, and nowhere else."""
CONNECTOR = "connector.safetensors"
"""Beside the tower: the last head."""
ROUGH = 0.5
"""Share of frames that are blurred or noisy a little, as a VAE's are."""


def main() -> None:
    options = arguments(__doc__, steps=4_000, batch_size=16, learning_rate=2e-3).parse_args()
    device = set_up(options)
    torch.manual_seed(options.seed)
    model = Eyes().to(device)
    training = Training("eyes", model, options)

    def make(step: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rng = stream(options.seed, 4_000_000, step)
        frames, answers = lesson(rng, options.batch_size, "train")
        chance = rng.random(answers["shape"].shape)
        answers["kept"] = np.argsort(np.where(answers["shape"] >= 0, 1, 0) + chance)[:, -KEPT:]
        return frames, answers

    def loss(step: int, data: tuple[np.ndarray, dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        frames, answers = data
        with precision(options, device):
            kept = torch.as_tensor(answers.pop("kept")).to(device)
            told = model(to_pixel_values(frames).to(device), kept)
        rows = torch.arange(len(kept), device=device)[:, None]
        return losses(told, {name: torch.as_tensor(value).to(device)[rows, kept] for name, value in answers.items()})

    training.run(make, loss)
    model.load_state_dict(training.average.weights)
    model.tower.save_pretrained(Path(options.folder) / "eyes", safe_serialization=True)
    save_file({"code": model.heads["code"].weight.data}, Path(options.folder) / "eyes" / CONNECTOR)
    print(json.dumps(measure(model, options.seed)))


class Eyes(nn.Module):
    """The tower with one linear head a question, for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = build_tower()
        width = VISION["hidden_size"]
        self.heads = nn.ModuleDict({name: nn.Linear(width, size, bias=name != "code") for name, size in HEADS.items()})

    def forward(self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """What each patch says, [n, k, ...]: those of index `kept`, int64 [n, k], or all."""
        tower = self.tower
        whole = torch.ones(
            len(pixel_values), FRAME // PATCH, FRAME // PATCH, dtype=torch.bool, device=pixel_values.device
        )
        states = tower.embeddings(pixel_values, whole)
        if kept is not None:
            states = states[torch.arange(len(kept), device=kept.device)[:, None], kept]
        early = states
        for number, layer in enumerate(tower.encoder.layers, 1):
            states = layer(states, None)
            early = states if number == MASK_LAYER else early
        late = tower.post_layernorm(states).float()
        return {name: head(early.float() if name == "mask" else late) for name, head in self.heads.items()}


def build_tower() -> Any:
    from transformers import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    tower = Idefics3VisionTransformer(Idefics3VisionConfig(**VISION))
    _look_around(tower)
    return tower


@torch.no_grad()
def _look_around(tower: Any) -> None:
    """Start each attention head at one neighbour, so that a tower of few layers need not find out where patches lie.

    Positions are sines and cosines of x and y in the first channels, one head wide, that patches leave empty; a head's
    queries are positions turned by one step, its keys are positions as they are.
    """
    side, heads = FRAME // PATCH, VISION["num_attention_heads"]
    width = VISION["hidden_size"] // heads
    rates = torch.arange(1, width // 4 + 1) * (torch.pi / (width // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([x.reshape(-1, 1) * rates, y.reshape(-1, 1) * rates], dim=1)
    embedding = tower.embeddings.position_embedding.weight.zero_()
    embedding[:, : width // 2], embedding[:, width // 2 : width] = angles.cos(), angles.sin()
    nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)
    tower.embeddings.patch_embedding.weight[:width] = 0
    for number, layer in enumerate(tower.encoder.layers):
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        query.mul_(0.1)
        key.mul_(0.1)
        for head in range(heads):
            step = torch.tensor(STEPS[number % 2][head % 4])
            turn = torch.cat([step[0] * rates, step[1] * rates])
            rows = slice(head * width, (head + 1) * width)
            cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
            query[rows, :width] = torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])
            key[rows, :width] = SHARP * torch.eye(width)


def to_pixel_values(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [..., H, W, 3] as the processor gives it: float32 [..., 3, H, W] in -1..1."""
    return torch.as_tensor(frames).movedim(-1, -3).float() / 127.5 - 1


def lesson(rng: np.random.Generator, clips: int, split: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some frames of `clips` clips, uint8 [n, 64, 64, 3], and for each patch what `HEADS` shall say, [n, 64, ...].

    -1 (NaN in `place` and `turn`) where there is nothing to say.
    """
    scenes = sample_scenes(rng, clips, split=split)
    seeds = [int(seed) for seed in rng.integers(1 << 62, size=clips)]
    frames, answers = [], []
    for scene, seed, clip in zip(scenes, seeds, render(scenes, seeds), strict=True):
        shown = rng.choice(len(clip), FRAMES_A_CLIP, replace=False)
        for at, code in zip(shown, patch_codes([scene], [seed], shown)[0], strict=True):
            answers.append(patch_answers(scene, clip[at], at >= cut_frame(len(clip))) | {"code": code})
            frames.append(roughened(clip[at], rng) if rng.random() < ROUGH else clip[at])
    return np.stack(frames), {name: np.stack([answer[name] for answer in answers]) for name in HEADS}


def roughened(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Softened and noisy a little, and still clean to a person."""
    blurred = cv2.GaussianBlur(frame, (0, 0), rng.uniform(0.2, 0.9)).astype(np.float32)
    noise = rng.standard_normal(frame.shape, dtype=np.float32) * np.float32(rng.uniform(0, 6))
    return np.clip(blurred + noise + rng.uniform(-6, 6, 3), 0, 255).round().astype(np.uint8)


def patch_answers(scene: Scene, frame: np.ndarray, late: bool) -> dict[str, np.ndarray]:
    """What each of the 64 patches of one rendered frame shows. `late`: the frame lies after the cut, if there is one."""
    shot = scene.shots[-1 if late else 0]
    side = FRAME // PATCH
    shape, colour = np.full((2, side, side), -1)
    place, turn, outline = (
        np.full((side, side, HEADS[name]), np.nan, np.float32) for name in ("place", "turn", "outline")
    )
    everything = np.zeros((FRAME, FRAME), np.float32)
    most = np.full((side, side), LEAST_COVERED, np.float32)
    for figure, mask in zip(shot.figures, _masks(frame, [str(figure.colour) for figure in shot.figures]), strict=True):
        covered = mask.reshape(side, PATCH, side, PATCH).sum(axis=(1, 3))
        mine = covered >= most
        most = np.maximum(most, covered)
        everything += mask
        assert figure.shape is not None and figure.colour is not None
        shape[mine], colour[mine] = SHAPES.index(figure.shape), COLOURS.index(figure.colour)
        x, y, radius = _centre(mask)
        place[mine] = _place(x, y, radius)
        outline[mine] = _outline(mask, x, y, radius)
        if fold := OUTLINES[figure.shape].fold:
            phase = _phase(mask, x, y, fold)
            turn[mine] = [np.cos(phase), np.sin(phase)]
    background = np.full(side * side, BACKGROUNDS.index(shot.background))  # type: ignore[arg-type]
    flat = {"shape": shape.reshape(-1), "colour": colour.reshape(-1), "background": background}
    own = everything.reshape(side, PATCH, side, PATCH).swapaxes(1, 2).reshape(side * side, -1)
    smooth = {"place": place, "turn": turn, "outline": outline}
    return flat | {"mask": own} | {name: value.reshape(side * side, -1) for name, value in smooth.items()}


def places(frame: np.ndarray, colours: list[str]) -> list[list[float]]:
    """Where the figures of these colours are in a frame of the world: x and y in -1..1, and the logarithm of the radius."""
    return [_place(*_centre(mask)) for mask in _masks(frame, colours)]


def _place(x: float, y: float, radius: float) -> list[float]:
    return [x / FRAME * 2 - 1, y / FRAME * 2 - 1, float(np.log(max(radius, 1.0) / 6))]


def _masks(frame: np.ndarray, colours: list[str]) -> list[np.ndarray]:
    """How much of each pixel each figure covers, float32 [64, 64]: along the way from the corner's colour to the figure's."""
    corner = frame[0, 0].astype(np.float32)
    away = frame.astype(np.float32) - corner
    vectors = [np.asarray(PALETTE[colour], np.float32) - corner for colour in colours]
    alongs = [away @ (vector / (vector @ vector)) for vector in vectors]
    offs = np.stack([np.square(away - a[..., None] * v).sum(axis=2) for a, v in zip(alongs, vectors, strict=True)])
    owner = offs.argmin(axis=0)
    return [
        np.where(owner == at, np.clip(along, 0, 1), 0).astype(np.float32) * (along > 0.1)
        for at, along in enumerate(alongs)
    ]


def _outline(mask: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    """The mask around its centre, at its own size: GRID x GRID samples."""
    step = radius * 3.4 / GRID
    corner = np.asarray([x, y]) - 0.5 - step * (GRID - 1) / 2
    where = np.asarray([[step, 0, corner[0]], [0, step, corner[1]]])
    return cv2.warpAffine(mask, where, (GRID, GRID), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP).reshape(-1)


_CENTRES = np.arange(FRAME, dtype=np.float32) + 0.5


def _centre(mask: np.ndarray) -> tuple[float, float, float]:
    area = mask.sum() + 1e-6
    return (
        float(mask.sum(axis=0) @ _CENTRES / area),
        float(mask.sum(axis=1) @ _CENTRES / area),
        float(np.sqrt(area / np.pi)),
    )


def _phase(mask: np.ndarray, x: float, y: float, fold: int) -> float:
    """Turns `fold` times as fast as the figure."""
    rows, columns = np.nonzero(mask)
    place = (columns + 0.5 - x) + 1j * (rows + 0.5 - y)
    weight = mask[rows, columns] * np.maximum(np.abs(place), 1e-3) ** (2 - fold)
    return float(np.angle((weight * place**fold).sum()))


def losses(told: dict[str, torch.Tensor], answers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    terms = {}
    for name in ("shape", "colour", "background"):
        terms[name] = nn.functional.cross_entropy(told[name].flatten(0, 1), answers[name].flatten(), ignore_index=-1)
    for name, weight in (("place", 2.0), ("turn", 0.3)):
        there = ~answers[name].isnan()
        terms[name] = weight * (told[name] - answers[name])[there].abs().mean()
    for name in ("outline", "mask"):
        there = ~answers[name].isnan()
        wanted = answers[name][there].clamp(0, 1)
        terms[name] = 2 * nn.functional.binary_cross_entropy_with_logits(told[name][there], wanted)
    terms["code"] = 4 * (told["code"] - SHARED * answers["code"]).square().mean()
    return terms


@torch.no_grad()
def measure(model: Eyes, seed: int, clips: int = 128) -> dict[str, float]:
    """On held-out scenes: the share of patches that tell shape and colour right, the part of tokens' codes that is explained,
    and the error of centres in pixels."""
    model.eval()
    frames, answers = lesson(stream(seed, 4_900_000), clips, "held_out")
    device = next(model.parameters()).device
    told = {name: value.cpu().numpy() for name, value in model(to_pixel_values(frames).to(device)).items()}
    there = answers["shape"] >= 0
    found = {name: float((told[name].argmax(-1) == answers[name])[there].mean()) for name in ("shape", "colour")}
    off, wanted = (token_codes(each) for each in (told["code"] / SHARED - answers["code"], answers["code"]))
    found["code"] = 1 - float(np.square(off).mean() / wanted.var())
    return found | {"centre": float(np.nanmean(np.abs(told["place"] - answers["place"])[..., :2]) * FRAME / 2)}


if __name__ == "__main__":
    main()
