"""Captions as text: the statements that one makes, a list of tags made of an answer, and what is wrong with an answer."""

from __future__ import annotations

import re
from collections import Counter

VERSION = "1"
"""Changes whenever another text may come of the same answers."""

LEAST_WORDS = {"short": 3, "dense": 5}
"""A caption with fewer words is near-empty."""
REPEATED = 0.4
"""Most of the words of a caption that may stand in a run of four which stood there before."""
RUN = 4
LONGEST_TAG = 4
"""Words; what is longer is a sentence, of which the phrases between little words are the tags."""
MOST_TAGS = 32

_CHATTER = re.compile(
    r"""^(sure|certainly|of\ course|absolutely|okay|ok)\s*[,.!:]
    |^(here\ is|here['’]s|here\ are)\b
    |\bas\ an?\ (ai|artificial\ intelligence|(large\ )?language\ model)\b
    |\bi(['’]m|\ am)\ (sorry|unable|not\ able)\b
    |\bi\ (cannot|can\ not|can['’]t)\b
    |\bi\ (do\ not|don['’]t)\ see\ (an?|any)\ (image|video)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_LEAD = re.compile(
    r"^(in )?(the|this|a|an) (image|picture|photo|video|clip|scene|frame)s?"
    r"( (shows?|depicts?|features?|displays?|presents?|captures?|contains?|is|of|opens with|begins with))?\b\s*",
    re.IGNORECASE,
)
_ENDS = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[^\W_]|[\"'(\[])")
_ABBREVIATION = re.compile(r"(^|[\s(])(mr|mrs|ms|dr|st|vs|no|fig|approx|e\.g|i\.e|[a-z])\.$", re.IGNORECASE)
_BULLET = re.compile(r"^\s*([-*•#]+|\d{1,2}[.)])\s*")
_LITTLE = frozenset(
    re.findall(
        "[a-z]+",
        "a an the this that these those it its he she they his her their there here and or but then while with without of on"
        " in at to from by for over under into onto against behind before after across is are was were be being has have had"
        " as which who where",
    )
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; joined by spaces they are the text."""
    found: list[str] = []
    for part in _ENDS.split(" ".join(text.split())):
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] += f" {part}"
        elif part:
            found.append(part)
    return found


def listed(answer: str) -> list[str]:
    """The items of an answer that is a list, by commas, semicolons or lines, each once and in order."""
    items = (_BULLET.sub("", item).strip(" .\t\"'`") for item in re.split(r"[,;\n]|\s(?:[-•*]|\d{1,2}[.)])\s", answer))
    found: dict[str, str] = {}
    for item in items:
        if item:
            found.setdefault(item.casefold(), item)
    return list(found.values())


def tags(answer: str) -> list[str]:
    """Tags in lower case, each once, in order of the alphabet; of a sentence its phrases between little words."""
    found: set[str] = set()
    for item in listed(_LEAD.sub("", answer.strip()).casefold()):
        words = re.findall(r"[^\W_]+(?:[-'’&][^\W_]+)*", item.replace("_", " "))
        runs = [words] if len(words) <= LONGEST_TAG else _runs(words)
        for run in runs:
            while run and run[0] in _LITTLE:
                run = run[1:]
            if run:
                found.add(" ".join(run))
    return sorted(found)[:MOST_TAGS]


def trouble(style: str, text: str) -> str:
    """What is wrong with a caption: `near-empty`, `boiler-plate`, `repetitive`, or nothing, ''."""
    words = _words(text)
    if len(words) < LEAST_WORDS.get(style, 1):
        return "near-empty"
    if style not in LEAST_WORDS:
        return ""
    if _CHATTER.search(text.strip()) or len(_words(_LEAD.sub("", text.strip()))) < LEAST_WORDS["short"]:
        return "boiler-plate"
    return "repetitive" if repeated(words) > REPEATED else ""


def repeated(words: list[str]) -> float:
    """The share of words in runs of `RUN` that stood in the text before; or else that of one word said `RUN` times on end."""
    seen: Counter[tuple[str, ...]] = Counter()
    again = [False] * len(words)
    for at in range(len(words) - RUN + 1):
        run = tuple(words[at : at + RUN])
        if seen[run]:
            again[at : at + RUN] = [True] * RUN
        seen[run] += 1
        if len(set(run)) == 1:
            again[at : at + RUN] = [True] * RUN
    return sum(again) / len(words) if words else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", text.casefold())


def _runs(words: list[str]) -> list[list[str]]:
    """The words between little words."""
    runs: list[list[str]] = [[]]
    for word in words:
        if word in _LITTLE:
            runs.append([])
        else:
            runs[-1].append(word)
    return [run for run in runs if run]
