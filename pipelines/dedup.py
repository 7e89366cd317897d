"""Which prompt records are kept: identical ones collapse, near ones are found, benchmark prompts stay out.

Near means a Jaccard similarity of word 3-shingles at or above `prompts.near_threshold`. Candidates come from MinHash with
banding (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3) by datasketch, and each is
checked on its shingles: a near match is never an accident of the sketch, and few are missed (see `Sketch`). Memory is
bounded: near-duplicates are looked for among the last `WINDOW` to twice `WINDOW` prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from pipelines.record_files import read_rows

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

    from pipelines.records import PromptRecord
    from pipelines.spec import Prompts, Storage

WINDOW = 50_000
"""Prompts in one generation of the near index; each takes about 4 kB, so 400 MB are the most."""

EXAMPLES = 5
SHINGLED_CHARACTERS = 20_000

# Chinese, Japanese and Korean are written without spaces: each of their characters is a word
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)


@dataclass(frozen=True, slots=True)
class Sketch:
    """How finely texts are sketched: hashes in a signature, and the part of pairs at the threshold that it must find."""

    num_perm: int
    recall: float

    def bands(self, threshold: float) -> tuple[int, int]:
        """Bands and rows of the signature: the fewest false candidates that still give the recall."""
        for rows in range(self.num_perm // 2, 1, -1):
            bands = self.num_perm // rows
            if 1 - (1 - threshold**rows) ** bands >= self.recall:
                return bands, rows
        return self.num_perm, 1


AMONG_PROMPTS = Sketch(num_perm=64, recall=0.95)
AGAINST_EXCLUDED = Sketch(num_perm=128, recall=0.999)
"""A benchmark's prompt that slips through costs more than a near-duplicate."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt that was not alone, and the one that it resembles."""

    kind: str  # identical, near_duplicate, excluded
    prompt: str
    like: str


@dataclass(slots=True)
class RecordReport:
    """What became of the records that were read."""

    read: int = 0
    blank: int = 0  # lines without a record
    bad: int = 0  # passed on, to fail by themselves: empty, not UTF-8, or with an input that cannot be read
    identical: int = 0
    near_duplicates: int = 0
    near_dropped: int = 0
    excluded: int = 0
    kept: int = 0
    examples: list[Example] = field(default_factory=list)

    def example(self, kind: str, prompt: str, like: str) -> None:
        """Keep the first few of each kind."""
        if sum(example.kind == kind for example in self.examples) < EXAMPLES:
            self.examples.append(Example(kind, prompt[:200], like[:200]))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line for the terminal; what is zero is not said."""
        counts = {
            "identical": self.identical,
            "near-duplicate" + (", dropped" if self.near_dropped else ""): self.near_duplicates,
            "excluded": self.excluded,
            "bad": self.bad,
            "blank": self.blank,
        }
        said = "".join(f", {count:,} {name}" for name, count in counts.items() if count)
        return f"{self.kept:,} of {self.read:,} prompt records kept{said}"


def normalised(text: str) -> str:
    """The text without what makes no difference: case and white space."""
    return " ".join(text.casefold().split())


def shingles(text: str, context: str = "") -> frozenset[bytes]:
    """Word 3-shingles of a text, punctuation and case left out; a shorter text is one shingle, an empty one has none.

    Texts of different `context` share none.
    """
    words = _WORDS.findall(text[:SHINGLED_CHARACTERS].casefold())
    if not words:
        return frozenset()
    return frozenset(
        (context + " ".join(words[at : at + 3])).encode("utf-8", "replace") for at in range(max(1, len(words) - 2))
    )


def jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    """Shared shingles as a part of all; 0 where there are none."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


class NearIndex:
    """Texts that a near match can find. With a `window` it forgets the oldest, in generations of that many."""

    def __init__(self, threshold: float, sketch: Sketch = AMONG_PROMPTS, window: int | None = None) -> None:
        from datasketch import MinHash

        self.threshold = threshold
        self.window = window
        self._params = sketch.bands(threshold)
        self._empty = MinHash(sketch.num_perm, hashfunc=crc32)
        self._generations = [self._generation()]
        self._size = 0

    def match(self, text: str, context: str = "") -> str | None:
        """A text already here that is near `text`, or None."""
        mine = shingles(text, context)
        return self._match(mine, self._sketch(mine)) if mine else None

    def match_or_add(self, text: str, context: str = "") -> str | None:
        """A text already here that is near `text`; where there is none, None, and `text` is here from now on.

        The same text, letter by letter, is not near itself.
        """
        mine = shingles(text, context)
        if not mine or any((text, context) in index for index in self._generations):
            return None
        sketch = self._sketch(mine)
        found = self._match(mine, sketch)
        if found is None:
            self._add((text, context), sketch)
        return found

    def _match(self, mine: frozenset[bytes], sketch: MinHash) -> str | None:
        for index in self._generations:
            for candidate in index.query(sketch):
                if jaccard(mine, shingles(*candidate)) >= self.threshold:
                    return str(candidate[0])
        return None

    def _add(self, key: tuple[str, str], sketch: MinHash) -> None:
        if self.window and self._size >= self.window:
            self._generations = [self._generation(), self._generations[0]]
            self._size = 0
        self._generations[0].insert(key, sketch, check_duplication=False)
        self._size += 1

    def _generation(self) -> MinHashLSH:
        from datasketch import MinHashLSH

        return MinHashLSH(num_perm=self._empty.num_perm, params=self._params)

    def _sketch(self, items: frozenset[bytes]) -> MinHash:
        sketch = self._empty.copy()
        sketch.update_batch(items)
        return sketch


class Exclusions:
    """Prompts that must not be generated from, such as a benchmark's: held in memory, found exactly and nearly."""

    def __init__(self, texts: Iterable[str], threshold: float) -> None:
        self._exact: dict[str, str] = {}
        self._near: NearIndex | None = None
        for text in texts:
            self._near = self._near or NearIndex(threshold, AGAINST_EXCLUDED)
            if self._exact.setdefault(normalised(text), text) is text:
                self._near.match_or_add(text)

    @classmethod
    def read(cls, prompts: Prompts, storage: Storage | None = None) -> Exclusions:
        """The prompts in the files that `prompts.exclude` names."""
        return cls(_excluded_texts(prompts, storage), prompts.near_threshold)

    def match(self, text: str) -> str | None:
        """The excluded prompt that `text` is or is near to, or None."""
        if self._near is None:
            return None
        exact = self._exact.get(normalised(text))
        return exact if exact is not None else self._near.match(text)


def _excluded_texts(prompts: Prompts, storage: Storage | None) -> Iterable[str]:
    for at, uri in enumerate(prompts.exclude):
        for row in read_rows(uri, key=f"prompts.exclude.{at}", column=prompts.column, storage=storage):
            text = (row.fields or {}).get(prompts.column)
            if isinstance(text, str) and text.strip():
                yield text


class Deduplicator:
    """Says of each record in turn whether it is kept, and writes down why not."""

    def __init__(self, prompts: Prompts, exclusions: Exclusions, report: RecordReport) -> None:
        self.report = report
        self._exclusions = exclusions
        self._drops_near = prompts.near_duplicates == "drop"
        self._near = None if prompts.near_duplicates == "ignore" else NearIndex(prompts.near_threshold, window=WINDOW)
        self._seen = SeenIds()

    def keeps(self, record: PromptRecord, prompt_id: str) -> bool:
        """Whether a record goes on. It is asked once for each record, in the order of the file."""
        if not self._seen.add(bytes.fromhex(prompt_id)):
            self.report.identical += 1
            self.report.example("identical", record.prompt, record.prompt)
            return False
        excluded = self._exclusions.match(record.prompt)
        if excluded is not None:
            self.report.excluded += 1
            self.report.example("excluded", record.prompt, excluded)
            return False
        if self._near is not None and self._is_near(record, self._near) and self._drops_near:
            self.report.near_dropped += 1
            return False
        self.report.kept += 1
        return True

    def _is_near(self, record: PromptRecord, index: NearIndex) -> bool:
        # The same words on another first frame are another prompt; so is the same text with another seed or shape.
        context = " ".join(item.sha256 or item.uri for item in record.inputs)
        like = index.match_or_add(record.prompt, context)
        if like is None:
            return False
        self.report.near_duplicates += 1
        self.report.example("near_duplicate", record.prompt, like)
        return True


class SeenIds:
    """A set of 16-byte ids in about 16 bytes each: a small set of new ones before sorted arrays of old ones."""

    def __init__(self, pending: int = 1 << 18) -> None:
        self._limit = pending
        self._new: set[bytes] = set()
        self._old: list[np.ndarray] = []  # each sorted and more than twice as long as the next

    def add(self, item: bytes) -> bool:
        """True where the id is new."""
        if item in self._new:
            return False
        wanted = item.rstrip(b"\0")  # as numpy gives back what it holds
        for array in self._old:
            at = int(array.searchsorted(np.bytes_(wanted)))
            if at < len(array) and array[at] == wanted:
                return False
        self._new.add(item)
        if len(self._new) >= self._limit:
            self._flush()
        return True

    def _flush(self) -> None:
        array = np.sort(np.array(list(self._new), dtype="S16"))
        self._new.clear()
        while self._old and len(self._old[-1]) <= 2 * len(array):
            array = np.sort(np.concatenate([self._old.pop(), array]))
        self._old.append(array)
