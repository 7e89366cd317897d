"""What a prompt says, as yes/no questions that depend on one another.

TIFA (arXiv 2303.11897) asks about each element of a prompt by itself; the Davidsonian Scene Graph (arXiv 2310.18235) adds
that a question may need others: whether the dog is brown counts only if there is a dog.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

VERSION = "1"
"""Changes whenever the same answer may be read as other facts, or the same probabilities be another score."""

HOLDS = 0.5
"""Least P(yes) of a fact that others may rest on."""

WHOLE = 'Does this {media} show what this description says? Description: "{prompt}" Answer Yes or No.'
"""What is asked of a prompt that is not decomposed."""

ENDING = " Answer Yes or No."

INSTRUCTION = """\
Split the description below into the smallest facts that can be seen, each a question whose answer is yes if it holds.
First each entity, then its attributes (colour, number, size, look, action), then relations between entities, and the setting.
One fact a line, in four fields with | between them:
number | entity, attribute or relation | numbers of the facts that it is about, or - | question
For the description "a brown dog chases two cats" the answer is:
1 | entity | - | Is there a dog?
2 | entity | - | Are there cats?
3 | attribute | 1 | Is the dog brown?
4 | attribute | 2 | Are there two cats?
5 | relation | 1, 2 | Does the dog chase the cats?
Write nothing else. Description: {prompt}"""

_KINDS = ("entity", "attribute", "relation")
_OPEN = re.compile(r"^(what|which|who|whom|whose|where|when|why|how)\b", re.IGNORECASE)
"""How a question begins that yes or no does not answer."""


@dataclass(frozen=True)
class Fact:
    """A question whose Yes is the good answer, and the places of the facts before it that it needs."""

    question: str
    needs: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: Any, place: int) -> Fact:
        """From {question, needs} or a text. Raises ValueError for what is neither, or needs what does not come before."""
        if isinstance(value, str):
            value = {"question": value}
        if not isinstance(value, dict) or not value.keys() <= {"question", "needs"}:
            raise ValueError(f"expected a question or {{question, needs}}, found {value!r:.80}")
        question, needs = value.get("question"), value.get("needs", ())
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"expected a question, found {question!r:.80}")
        if not isinstance(needs, (list, tuple)) or any(type(at) is not int or not 0 <= at < place for at in needs):
            raise ValueError(f"expected needs to be places of questions before the {place}th, found {needs!r:.80}")
        return cls(question, tuple(needs))


def parse_facts(answer: str) -> tuple[Fact, ...]:
    """The facts that a language model wrote in the form of `INSTRUCTION`.

    Lines without a bar are passed over. A line with one that is not of the form makes the answer worthless, because a fact
    that is left out would count as one that holds: ValueError.
    """
    facts: list[Fact] = []
    places: dict[str, int] = {}
    for line in (line.strip() for line in answer.splitlines()):
        if "|" not in line:
            continue
        fields = [field.strip() for field in line.strip("|").split("|")]
        if len(fields) != 4:
            raise ValueError(f"expected four fields, found {line!r:.80}")
        number, kind, needs, question = fields
        number = number.rstrip(".)")
        if not number.isdecimal() or number in places:
            raise ValueError(f"expected a number that no other line has, found {line!r:.80}")
        if kind.lower() not in _KINDS:
            raise ValueError(f"expected {', '.join(_KINDS)}, found {line!r:.80}")
        if not question.endswith("?") or len(question) < 2 or _OPEN.match(question):
            raise ValueError(f"expected a question that yes or no answers, found {line!r:.80}")
        named = [] if needs in ("", "-", "0") else [each.strip() for each in needs.split(",")]
        if any(each not in places for each in named):
            raise ValueError(f"expected numbers of lines before it, found {line!r:.80}")
        places[number] = len(facts)
        facts.append(Fact(question + ENDING, tuple(places[each] for each in dict.fromkeys(named))))
    if not facts:
        raise ValueError(f"expected lines with four fields, found {answer!r:.80}")
    return tuple(facts)


Score = Literal["mean", "least"]


def score_of(p_yes: Sequence[float], facts: Sequence[Fact], how: Score) -> float:
    """The mean P(yes) of facts, where one that needs another which does not hold (P < `HOLDS`, or counted 0 itself) counts 0;
    or the least P(yes) of all. NaN where a probability is no number."""
    if any(math.isnan(p) for p in p_yes):
        return math.nan
    if how == "least":
        return float(min(p_yes))
    counted: list[float] = []
    for p, fact in zip(p_yes, facts, strict=True):
        counted.append(float(p) if all(counted[at] >= HOLDS for at in fact.needs) else 0.0)
    return sum(counted) / len(counted)
