"""A folder of clips of the small world with planted flaws, and the truth about each: what curation is measured on.

    python -m models.pack.planted --clips 2000 --out out/planted

    out/planted/clips/00000.mp4, 00000.txt    64x64, 8 frames a second; captions beside most
    out/planted/truth.jsonl                   a line a clip: file, flaw, prompt (what it shows), caption, cut, duplicate_of

A twentieth of the clips has each flaw: frozen (no frame differs from the first), flickering (brightness jumps), cut (two
shots in one file), dark, duplicated (of an earlier clip: its bytes, or its frames compressed harder), mislabelled (another
scene's caption). All others are clean: one or two figures, of which one moves at least, on a background that is not black.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from infra.media import encode
from models.pack.grammar import Scene, sample_scenes
from models.pack.phrases import describe
from models.pack.world import FPS, NUM_FRAMES, render

FLAWS = ("frozen", "flickering", "cut", "dark", "duplicated", "mislabelled")
SHARE = 0.05
"""Of the clips, of each flaw."""
CAPTIONED = 0.8
FLICKER = 0.2
DARK = 0.06
CRF, HARD_CRF = 18, 23
STREAM = 0x9C1A


@dataclass(frozen=True)
class Truth:
    """What is known of a clip. `prompt` says all that it shows; of two shots, what the first does."""

    file: str
    flaw: str
    prompt: str
    caption: str
    cut: float | None = None
    duplicate_of: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.pack.planted", description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=2000, help="how many files")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or one that is not there")
    parser.add_argument("--seed", type=int, default=0, help="of what they show and where flaws are")
    asked = parser.parse_args(arguments)
    plant(asked.out, asked.clips, asked.seed)


def plant(out: Path, count: int, seed: int = 0) -> list[Truth]:
    """Make `count` clips below `out`, and return the truth about them. The same arguments give the same bytes."""
    clips = out / "clips"
    clips.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(key=[seed, STREAM]))
    flaws = _flaws(count, rng)
    scenes = [_scene(rng) for _ in range(count + 1)]
    truths: list[Truth] = []
    for at, flaw in enumerate(flaws):
        truths.append(_make(clips, at, flaw, scenes, truths, rng, seed))
    lines = [json.dumps(asdict(truth)) for truth in truths]
    (out / "truth.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return truths


def _flaws(count: int, rng: np.random.Generator) -> list[str]:
    """A flaw or none for each clip; the first has none, so that there is one to duplicate."""
    each = max(1, round(SHARE * count))
    flaws = [flaw for flaw in FLAWS for _ in range(each)]
    if len(flaws) >= count:
        raise ValueError(f"clips: expected more than {len(flaws)}, so that some have no flaw, found {count}")
    flaws += [""] * (count - 1 - len(flaws))
    return ["", *(flaws[at] for at in rng.permutation(len(flaws)))]


def _scene(rng: np.random.Generator) -> Scene:
    """One in which something moves, on a background that is not black."""
    while True:
        (scene,) = sample_scenes(rng, 1, kinds=[("one", "two")[int(rng.integers(2))]])  # type: ignore[list-item]
        moves = any(figure.motion != "still" for figure in scene.figures)
        if moves and all(shot.background != "black" for shot in scene.shots):
            return scene


def _make(
    clips: Path, at: int, flaw: str, scenes: list[Scene], before: list[Truth], rng: np.random.Generator, seed: int
) -> Truth:
    name = f"{at:05d}.mp4"
    scene, other = scenes[at], scenes[at + 1]
    frames, prompt, cut, crf = render([scene], [seed * 1_000_003 + at])[0], describe(scene, rng), None, CRF
    like = None
    if flaw == "frozen":
        frames = np.repeat(frames[:1], len(frames), axis=0)
    elif flaw == "flickering":
        strength = rng.uniform(0.5, 1.0, len(frames)) * FLICKER * np.where(np.arange(len(frames)) % 2, 1, -1)
        frames = _bytes(frames * (1 + strength[:, None, None, None]))
    elif flaw == "dark":
        frames = _bytes(frames * DARK)
    elif flaw == "cut":
        frames = np.concatenate([frames, render([other], [seed * 1_000_003 + at + 500_000])[0]])
        cut = NUM_FRAMES / FPS
    elif flaw == "duplicated":
        sound = [truth for truth in before if not truth.flaw]
        like = sound[int(rng.integers(len(sound)))]
        frames, prompt = _again(like, seed, scenes), like.prompt
        crf = CRF if rng.random() < 0.5 else HARD_CRF
    data = encode(frames, FPS, crf=crf, marked=False).data
    (clips / name).write_bytes(data)
    caption = prompt if rng.random() < CAPTIONED else ""
    if flaw == "mislabelled":
        caption = describe(_unlike(scene, scenes, rng), rng)
    if caption:
        (clips / f"{at:05d}.txt").write_text(caption + "\n", encoding="utf-8")
    return Truth(f"clips/{name}", flaw, prompt, caption, cut, like.file if like else None)


def _again(like: Truth, seed: int, scenes: list[Scene]) -> np.ndarray:
    at = int(Path(like.file).stem)
    return render([scenes[at]], [seed * 1_000_003 + at])[0]


def _unlike(scene: Scene, scenes: list[Scene], rng: np.random.Generator) -> Scene:
    """Another clip's scene, none of whose figures has a shape or colour of this one's."""
    mine = {value for figure in scene.figures for value in (figure.shape, figure.colour)}
    while True:
        other = scenes[int(rng.integers(len(scenes)))]
        if not mine & {value for figure in other.figures for value in (figure.shape, figure.colour)}:
            return other


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).round().astype(np.uint8)


if __name__ == "__main__":
    main()
