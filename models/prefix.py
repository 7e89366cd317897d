"""What a multimodal model has read of clips: keys and values, kept while there is room, and forked for each question."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Prefix:
    """Clips that were read together.

    cache: transformers' keys and values, one row a clip, `length` tokens each. deltas: [1, 1], what Qwen-VL's positions of
    text are ahead of the number of tokens; None for other families.
    """

    cache: Any
    length: int
    clips: int
    deltas: torch.Tensor | None

    def rows(self, which: list[int]) -> Any:
        """A cache of some rows, in that order and as often as they are named, to go on from. This one stays as it is."""
        import torch

        forked = copy.copy(self.cache)
        forked.layers = [copy.copy(layer) for layer in self.cache.layers]
        forked.batch_select_indices(torch.tensor(which, device=self.cache.layers[0].keys.device))
        return forked


class Place(NamedTuple):
    """Where a clip has been read."""

    prefix: Prefix
    row: int


class Prefixes:
    """Prefixes of at most `room` tokens in all, or else the last one alone."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._places: OrderedDict[Prefix, list[bytes]] = OrderedDict()
        self._found: dict[bytes, Place] = {}

    def find(self, clip: np.ndarray) -> Place | None:
        """Where a clip uint8 [T, H, W, 3] has been read, if that is kept."""
        return self._found.get(_digest(clip))

    def keep(self, prefix: Prefix, clips: np.ndarray) -> list[Place]:
        """Take in a prefix of clips uint8 [n, T, H, W, 3]; where each of them is."""
        digests = [_digest(clip) for clip in clips]
        places = [Place(prefix, row) for row in range(len(clips))]
        self._places[prefix] = digests
        self._found.update(zip(digests, places, strict=True))
        while len(self._places) > 1 and sum(each.length * each.clips for each in self._places) > self._room:
            old, gone = self._places.popitem(last=False)
            for digest in gone:
                if (place := self._found.get(digest)) is not None and place.prefix is old:
                    del self._found[digest]
        return places


def _digest(clip: np.ndarray) -> bytes:
    return hashlib.blake2b(repr(clip.shape).encode() + clip.tobytes(), digest_size=16).digest()
