"""Prompts of the small world: many ways to say a scene, and a parser that reads every one of them back.

a small red circle moving right on a white background
over a black background, a spinning yellow star and a big blue ring at rest
a red cross growing on a grey background, then a white square bouncing on a blue background
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from models.pack.grammar import Figure, Scene, Shot, flaw

if TYPE_CHECKING:
    import numpy as np

Value = TypeVar("Value")
Phrases = Mapping[Any, tuple[str, ...]]
"""Ways to say each value, the plain one first."""

NOUNS: Phrases = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    None: ("shape", "figure"),
}
COLOURS: Phrases = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "white": ("white",),
    "black": ("black",),
}
SIZES: Phrases = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "middle-sized"),
    "large": ("large", "big", "huge"),
}
BACKGROUNDS: Phrases = {
    "white": ("white",),
    "black": ("black",),
    "grey": ("grey", "gray"),
    "blue": ("blue",),
    "yellow": ("yellow",),
}
MOTIONS: Phrases = {
    "left": ("moving left", "moving to the left", "sliding left", "sliding to the left", "that moves left"),
    "right": ("moving right", "moving to the right", "sliding right", "sliding to the right", "that moves right"),
    "up": ("moving up", "moving upwards", "rising", "sliding up", "that moves up"),
    "down": ("moving down", "moving downwards", "falling", "sliding down", "that moves down"),
    "still": ("standing still", "staying still", "at rest", "not moving", "that stays still"),
    "growing": ("growing", "getting bigger", "getting larger", "that grows"),
    "shrinking": ("shrinking", "getting smaller", "that shrinks"),
    "spinning": ("spinning", "spinning in place", "rotating", "turning around", "that spins"),
    "bouncing": ("bouncing", "bouncing up and down", "hopping up and down", "that bounces"),
}
"""Said after the noun."""

ADJECTIVES: Phrases = {
    "still": ("still", "motionless"),
    "growing": ("growing",),
    "shrinking": ("shrinking",),
    "spinning": ("spinning", "rotating"),
    "bouncing": ("bouncing",),
    "up": ("rising",),
    "down": ("falling",),
}
"""Motions said before the noun."""

VIDEO_LEADS = ("", "a video of", "a clip of", "an animation of")
IMAGE_LEADS = ("", "a picture of", "an image of", "a drawing of")
ARTICLES = ("a", "an", "one", "the")
BEFORE_BACKGROUND = ("on", "over", "against", "in front of")
BACKGROUND_NOUNS = ("background", "backdrop")
JOINTS = ("and", "next to", "beside", "together with")
CUTS = (", then", ", and then", "; then", ", followed by")
FILLERS = ("is", "that is", "which is", "plain", "solid", "first", "there is")
"""Words that the parser passes over: a user may write them, `describe` never does."""


def _vocabulary() -> frozenset[str]:
    tables = (NOUNS, COLOURS, SIZES, BACKGROUNDS, MOTIONS, ADJECTIVES)
    said = [phrase for table in tables for phrases in table.values() for phrase in phrases]
    said += [*VIDEO_LEADS, *IMAGE_LEADS, *ARTICLES, *BEFORE_BACKGROUND, *BACKGROUND_NOUNS, *JOINTS, *CUTS, *FILLERS]
    return frozenset(word for phrase in said for word in _words(phrase))


def _words(text: str) -> list[str]:
    """Lower-case words and the commas and semicolons between them."""
    return re.findall(r"[^\W_]+(?:-[^\W_]+)*|[,;]", text.lower())


@cache
def _split(phrase: str) -> tuple[str, ...]:
    return tuple(_words(phrase))


VOCABULARY = _vocabulary()
LONGEST = 5
"""Words in the longest phrase, and room to spare."""


def words_outside(prompt: str) -> list[str]:
    """The words of `prompt` that the world has no meaning for, each once, in order."""
    return [word for word in dict.fromkeys(_words(prompt)) if word not in VOCABULARY]


def describe(scene: Scene, rng: np.random.Generator | None = None, habits: dict[Any, Any] | None = None) -> str:
    """A prompt that says `scene`: the plain one, or with `rng` one of many.

    `habits` holds the choices made so far, and takes up those made here: given again, the same is said in the same words.
    """
    say = _Speaker(rng, habits)
    moves = scene.kind == "cut" or any(figure.motion for figure in scene.figures)
    lead = say.one_of(VIDEO_LEADS if moves else (*IMAGE_LEADS, *VIDEO_LEADS), 0.6)
    shots = [say.shot(shot, background_first=not lead and scene.kind != "cut") for shot in scene.shots]
    return f"{lead} {f'{say.one_of(CUTS, 0.5)} '.join(shots)}".strip()


@dataclass(frozen=True)
class _Speaker:
    rng: np.random.Generator | None
    habits: dict[Any, Any] | None = None

    def one_of(self, phrases: Sequence[str], plain: float = 0.4) -> str:
        """The first phrase with probability `plain`, else any; without a generator always the first."""

        def choose() -> str:
            if self.rng is None or self.rng.random() < plain:
                return phrases[0]
            return phrases[int(self.rng.integers(len(phrases)))]

        return self._habit(tuple(phrases), choose)

    def shot(self, shot: Shot, background_first: bool) -> str:
        figures = f" {self.one_of(JOINTS, 0.7)} ".join(self.figure(figure) for figure in shot.figures)
        if shot.background is None:
            return figures
        colour, noun = self.one_of(BACKGROUNDS[shot.background], 0.7), self.one_of(BACKGROUND_NOUNS, 0.7)
        background = f"{self.one_of(BEFORE_BACKGROUND)} a {colour} {noun}"
        first = background_first and self._chance(0.25, "background")
        return f"{background}, {figures}" if first else f"{figures} {background}"

    def figure(self, figure: Figure) -> str:
        before, after = [], ""
        if figure.motion in ADJECTIVES and self._chance(0.25, figure.motion):
            before.append(self.one_of(ADJECTIVES[figure.motion]))
        elif figure.motion is not None:
            after = self.one_of(MOTIONS[figure.motion])
        if figure.size is not None:
            before.append(self.one_of(SIZES[figure.size]))
        if figure.colour is not None:
            before.append(self.one_of(COLOURS[figure.colour]))
        words = " ".join([*before, self.one_of(NOUNS[figure.shape]), after]).strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def _chance(self, probability: float, what: str | None) -> bool:
        rng = self.rng
        return rng is not None and self._habit(what, lambda: bool(rng.random() < probability))

    def _habit(self, what: Any, choose: Callable[[], Value]) -> Value:
        if self.habits is None:
            return choose()
        if what not in self.habits:
            self.habits[what] = choose()
        return cast(Value, self.habits[what])


def parse(prompt: str) -> Scene | None:
    """The scene that `prompt` says, with None for what it leaves unsaid; None where it is not of the grammar."""
    reader = _Reader(_words(prompt))
    reader.skip((*VIDEO_LEADS, *IMAGE_LEADS))
    shots = [reader.shot()]
    while reader.skip(CUTS) or reader.skip(("then",)):
        shots.append(reader.shot())
    if None in shots or not reader.done():
        return None
    scene = Scene(tuple(shot for shot in shots if shot is not None))
    return scene if flaw(scene) is None else None


@dataclass
class _Reader:
    words: list[str]
    at: int = 0

    def done(self) -> bool:
        return self.at == len(self.words)

    def skip(self, phrases: Sequence[str]) -> bool:
        """Pass over the longest of `phrases` that comes next, if one does."""
        return self._longest({words: (None,) for words in map(_split, phrases) if words}) is not None

    def take(self, table: Phrases) -> tuple[Any] | None:
        """The value of the longest phrase of `table` that comes next, as a tuple of one; None where none does."""
        return self._longest({_split(phrase): (value,) for value, phrases in table.items() for phrase in phrases})

    def _longest(self, values: Mapping[tuple[str, ...], tuple[Any]]) -> tuple[Any] | None:
        for length in range(LONGEST, 0, -1):
            if (value := values.get(tuple(self.words[self.at : self.at + length]))) is not None:
                self.at += min(length, len(self.words) - self.at)
                return value
        return None

    def shot(self) -> Shot | None:
        self._skip_fillers()
        self.skip((",",))
        background = self.background()
        if background is not None:
            self.skip((",",))
            self._skip_fillers()
        figures = [self.figure()]
        while figures[-1] is not None and self._joins():
            figures.append(self.figure())
        background = background or self.background()
        if None in figures:
            return None
        return Shot(tuple(figure for figure in figures if figure is not None), background)

    def _joins(self) -> bool:
        """Whether another figure follows; ", and then" starts a new shot instead."""
        start = self.at
        self.skip((",",))
        if self.skip(JOINTS) and self.words[self.at : self.at + 1] != ["then"]:
            return True
        self.at = start
        return False

    def background(self) -> Any:
        start = self.at
        if self.skip(BEFORE_BACKGROUND):
            self.skip(ARTICLES)
            self._skip_fillers()
            colour = self.take(BACKGROUNDS)
            if colour is not None and self.skip(BACKGROUND_NOUNS):
                return colour[0]
        self.at = start
        return None

    def figure(self) -> Figure | None:
        self.skip(ARTICLES)
        said: dict[str, Any] = {}
        tables = {"size": SIZES, "colour": COLOURS, "motion": ADJECTIVES}
        while (found := self._one_of(tables)) is not None:
            name, value = found
            if name in said:
                return None
            said[name] = value
        noun = self.take(NOUNS)
        if noun is None:
            return None
        self._skip_fillers()
        motion = self.take(MOTIONS)
        if motion is not None:
            if "motion" in said:
                return None
            said["motion"] = motion[0]
        figure = Figure(shape=noun[0], **said)
        # To grow from small and to shrink from large is what these motions are: the size says nothing more.
        if (figure.motion, figure.size) in {("growing", "small"), ("shrinking", "large")}:
            return replace(figure, size=None)
        return figure

    def _one_of(self, tables: Mapping[str, Phrases]) -> tuple[str, Any] | None:
        for name, table in tables.items():
            if (value := self.take(table)) is not None:
                return name, value[0]
        return None

    def _skip_fillers(self) -> None:
        while self.skip(FILLERS):
            pass
