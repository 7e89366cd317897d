"""The small world's renderer: scenes in, anti-aliased clips out, hundreds a second on one core.

What a scene does not say (where a figure starts, how fast it moves, the exact shade) is drawn from the clip's own seed, so
that a clip has the same bytes whatever is rendered beside it. Motions are steady, figures stay inside the frame and never
touch. Lengths are pixels, y points down, a pixel's centre lies at a half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import pi, radians

import numpy as np

from models.pack.geometry import OUTLINES, Array, coverage, support
from models.pack.grammar import Colour, Figure, Scene, Shape, flaw, is_complete

FRAME = 64
NUM_FRAMES = 17
FPS = 8

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (210, 35, 40),
    "orange": (242, 128, 25),
    "yellow": (252, 220, 60),
    "green": (25, 145, 60),
    "blue": (30, 70, 215),
    "purple": (165, 50, 205),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
    "grey": (128, 128, 128),
}
RADII: dict[str, float] = {"small": 6.0, "medium": 7.5, "large": 9.3}
"""Radius of the disc of the same area: each size has 1.6 times the area of the one before. Of the largest two just fit in."""

SHADE = 6.0
"""A clip's colours differ from the palette by at most this much in each channel."""
RADIUS_SPREAD = 0.03
TRAVEL = (11.0, 18.0)
"""How far a moving figure gets in a clip."""
SHORT_TRAVEL = (9.0, 14.0)
"""The same in a shot of less than SHORT frames."""
SHORT = 13
BOUNCE_HEIGHT = (8.0, 12.0)
BOUNCE_FRAMES = 8
SPIN = radians(12.0)
"""Clockwise turn from one frame to the next; figures start upright."""
MARGIN = 1.0
"""Between a figure and the frame's edge."""
GAP = 2.0
"""Between two figures."""

CANDIDATES = 48
ATTEMPTS = 5000
"""Places drawn at a time for two figures, until one keeps them apart, and how often."""
CHUNK = 64
"""Clips rendered at a time: what they need fits a cache."""
PATCHES = (16, 20, 24, 28, 32, 36, 40)
AXES = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
DIRECTIONS = np.stack([np.cos(np.arange(20) * pi / 10), np.sin(np.arange(20) * pi / 10)], axis=1)
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def cut_frame(num_frames: int) -> int:
    """First frame of the second shot: where a latent frame of a video VAE begins, which holds four frames after the first."""
    return 1 + 4 * round((num_frames - 1) / 8)


def render(scenes: Sequence[Scene], seeds: Sequence[int], *, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Clips of complete scenes, one for each seed: uint8 [n, num_frames, 64, 64, 3], RGB, for 8 frames a second.

    One frame makes images, whose figures have no motion. ValueError for a scene that is incomplete or not of the world.
    """
    if len(scenes) != len(seeds):
        raise ValueError(f"one seed a scene: there are {len(scenes)} scenes and {len(seeds)} seeds")
    for scene in scenes:
        if (why := flaw(scene)) is not None or not is_complete(scene, image=num_frames == 1):
            raise ValueError(f"cannot render {scene}: {why or 'something that can be seen is not said'}")
        if scene.kind == "cut" and num_frames < 9:
            raise ValueError(f"a clip with a cut has at least 9 frames, not {num_frames}")
    frames = np.empty((len(scenes), num_frames, FRAME, FRAME, 3), dtype=np.uint8)
    for start in range(0, len(scenes), CHUNK):
        part = slice(start, start + CHUNK)
        _render(scenes[part], seeds[part], frames[part])
    return frames


def _render(scenes: Sequence[Scene], seeds: Sequence[int], frames: Array) -> None:
    num_frames = frames.shape[1]
    shades, tracks = _drawn(scenes, seeds, num_frames)
    colours = []
    for scene, shade in zip(scenes, shades, strict=True):
        said = [(shot.background, *(figure.colour for figure in shot.figures)) for shot in scene.shots]
        colours.append(
            [[_shade(name, shade[2 * at + slot]) for slot, name in enumerate(names)] for at, names in enumerate(said)]
        )
    draw(tracks, colours, frames)


def draw(tracks: list[Track], colours: Sequence[Sequence[Sequence[Array]]], frames: Array) -> None:
    """Paint clips, `frames` [n, T, 64, 64, 3]: by clip and shot the colours of the background and of each figure, RGB."""
    num_frames = frames.shape[1]
    cut = cut_frame(num_frames)
    planes = np.zeros((len(frames) * num_frames, FRAME, FRAME), dtype=np.uint8)
    _draw(tracks, planes, num_frames)
    for clip, shots in enumerate(colours):
        times = (slice(None),) if len(shots) == 1 else (slice(0, cut), slice(cut, None))
        for shot, when in zip(shots, times, strict=True):
            plane = planes.reshape(len(frames), num_frames, FRAME, FRAME)[clip, when]
            frames[clip, when] = _mix(shot)[plane].view(np.uint8).reshape(*plane.shape, 4)[..., :3]


def tracks(scenes: Sequence[Scene], seeds: Sequence[int], *, num_frames: int = NUM_FRAMES) -> list[Track]:
    """Where every figure of the clips that `render` makes of the same scenes and seeds is in each of its frames."""
    return _drawn(scenes, seeds, num_frames)[1]


def _drawn(scenes: Sequence[Scene], seeds: Sequence[int], num_frames: int) -> tuple[list[Array], list[Track]]:
    """What each seed decides: the shades, [4, 3] for each clip, and all tracks."""
    rngs = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
    shades = [rng.uniform(-SHADE, SHADE, (4, 3)) for rng in rngs]
    return shades, [
        track for clip, scene in enumerate(scenes) for track in _layout(clip, scene, num_frames, rngs[clip])
    ]


def _shade(colour: str | None, shift: Array) -> Array:
    return np.clip(np.asarray(PALETTE[str(colour)]) + shift, 0, 255)


def _mix(colours: Sequence[Array]) -> Array:
    """RGBx as one uint32 for each value of a plane: 0..127 from background to first figure, 128..255 to second."""
    share = np.linspace(0, 1, 128)[:, None]
    table = np.zeros((256, 4), dtype=np.uint8)
    for at, colour in enumerate(colours[1:]):
        table[128 * at : 128 * at + 128, :3] = np.rint((1 - share) * colours[0] + share * colour)
    return table.view(np.uint32)[:, 0]


@dataclass
class Track:
    """One figure's way through a clip, from frame `start` on: position, radius and turn, for each of its frames.

    The position is relative to where it starts until `move` has put it in its place.
    """

    clip: int
    slot: int
    shape: Shape
    colour: Colour
    start: int
    x: Array
    y: Array
    r: Array
    angle: Array

    def support(self, directions: Array) -> Array:
        return support(self.shape, self.r, self.angle, directions)

    def starts(self, draws: Array) -> Array:
        """Where it may start and stay inside the frame, [k, 2], for draws of [0, 1), [k, 2]."""
        right, down, left, up = self.support(AXES).T
        least = np.array([np.max(left - self.x), np.max(up - self.y)]) + MARGIN
        most = FRAME - np.array([np.max(right + self.x), np.max(down + self.y)]) - MARGIN
        return least + draws * (most - least)

    def move(self, start: Array) -> None:
        self.x, self.y = self.x + start[0], self.y + start[1]


def _layout(clip: int, scene: Scene, num_frames: int, rng: np.random.Generator) -> list[Track]:
    """The tracks of one clip, in place. Pairs that have little room are drawn anew until they keep apart."""
    for _ in range(ATTEMPTS):
        tracks = list(_tracks(clip, scene, num_frames, rng))
        if _place(tracks, rng):
            return tracks
    raise ValueError(f"found no room for both figures of {scene}")


def _tracks(clip: int, scene: Scene, num_frames: int, rng: np.random.Generator) -> Iterator[Track]:
    for shot, (start, length) in zip(scene.shots, spans(scene, num_frames), strict=True):
        for slot, figure in enumerate(shot.figures):
            assert figure.shape is not None and figure.colour is not None
            yield Track(clip, slot, figure.shape, figure.colour, start, *path(figure, length, rng.random(4)))


def spans(scene: Scene, num_frames: int) -> list[tuple[int, int]]:
    """The first frame of each shot, and how many it has."""
    cut = cut_frame(num_frames)
    return [(0, num_frames)] if len(scene.shots) == 1 else [(0, cut), (cut, num_frames - cut)]


def path(figure: Figure, length: int, draws: Array) -> tuple[Array, Array, Array, Array]:
    """x and y relative to where it starts, radius and turn of a figure, [length] each, for four draws of [0, 1)."""
    spread, travel, height, phase = draws
    still = np.zeros(length)
    x: Array = still
    y: Array = still
    angle: Array = still
    time = np.linspace(0.0, 1.0, length) if length > 1 else still
    r = np.full(length, RADII[figure.size]) if figure.size else _resized(time, figure.motion == "growing")
    if figure.motion in STEP:
        low, high = TRAVEL if length >= SHORT else SHORT_TRAVEL
        x, y = (axis * (low + travel * (high - low)) * time for axis in STEP[figure.motion])
    elif figure.motion == "bouncing":
        low, high = BOUNCE_HEIGHT
        # In a short shot the ground comes in the middle, so that both ways are seen.
        phase = phase if length >= SHORT else 0.35 + 0.25 * phase
        swing = (np.arange(length) / BOUNCE_FRAMES + phase) % 1.0
        y = -(low + height * (high - low)) * (1 - (2 * swing - 1) ** 2)
    elif figure.motion == "spinning":
        angle = SPIN * np.arange(length)
    return x, y, r * (1 + RADIUS_SPREAD * (2 * spread - 1)), angle


def _resized(time: Array, growing: bool) -> Array:
    share = time if growing else 1 - time
    return RADII["small"] + (RADII["large"] - RADII["small"]) * share


def _place(tracks: list[Track], rng: np.random.Generator) -> bool:
    """Give each track a place to start, two in one shot so that they never touch; whether one was found."""
    if len(tracks) == 1 or tracks[1].slot == 0:
        for track in tracks:
            track.move(track.starts(rng.random((1, 2)))[0])
        return True
    first, second = tracks
    draws = rng.random((CANDIDATES, 2, 2))
    a, b = first.starts(draws[:, 0]), second.starts(draws[:, 1])
    good = np.flatnonzero(_apart(first, a, second, b))
    if len(good):
        first.move(a[good[0]])
        second.move(b[good[0]])
    return bool(len(good))


def _apart(first: Track, a: Array, second: Track, b: Array) -> Array:
    """For each candidate, whether in every frame some direction has a GAP between the two figures: [k] bool."""
    between = np.stack([second.x - first.x, second.y - first.y], axis=1) + (b - a)[:, None, :]
    needed = first.support(DIRECTIONS) + second.support(-DIRECTIONS) + GAP
    return np.all(np.any(between @ DIRECTIONS.T >= needed, axis=2), axis=1)


def _draw(tracks: list[Track], planes: Array, num_frames: int) -> None:
    """Paint every figure's coverage into the planes, all figures of one shape and like size at once."""
    groups: dict[tuple[int, Shape, bool, int], list[Array]] = {}
    for track in tracks:
        where = track.clip * num_frames + track.start + np.arange(len(track.x))
        rows = np.stack([where, track.x, track.y, track.r, track.angle], axis=1)
        need = 2 * OUTLINES[track.shape].reach * float(track.r.max()) + 3
        patch = next(size for size in PATCHES if size >= need)
        groups.setdefault((track.slot, track.shape, bool(np.any(track.angle)), patch), []).append(rows)
    for (slot, shape, _, patch), parts in sorted(groups.items(), key=lambda group: group[0]):
        rows = np.concatenate(parts)
        for start in range(0, len(rows), CHUNK):
            _paint(rows[start : start + CHUNK], slot, shape, patch, planes)


def _paint(rows: Array, slot: int, shape: Shape, patch: int, planes: Array) -> None:
    where = rows[:, 0].astype(np.intp)
    x, y, r, angle = (column.astype(np.float32)[:, None, None] for column in rows.T[1:])
    left, top = (np.clip(np.rint(rows[:, axis] - patch / 2), 0, FRAME - patch).astype(np.intp) for axis in (1, 2))
    centres = np.arange(patch, dtype=np.float32) + np.float32(0.5)
    across = (left[:, None] + centres).astype(np.float32)[:, None, :] - x
    along = (top[:, None] + centres).astype(np.float32)[:, :, None] - y
    share = coverage(shape, across, along, r, angle)
    share *= np.float32(127)
    values = np.rint(share).astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(planes, (patch, patch), axis=(1, 2), writeable=True)
    at = (where, top, left)
    if slot:
        # The second figure's patch may overlap the first figure's, its own pixels never do.
        values = np.where(values > 0, values + np.uint8(128), windows[at])
    windows[at] = values
