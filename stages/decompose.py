"""DecomposePrompts: each prompt's facts, as yes/no questions for the judge (see models/facts.py)."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from infra.errors import UserError
from infra.storage import Storage
from infra.telemetry import log
from models.facts import INSTRUCTION, Fact, parse_facts
from models.language import LanguageRef, load_language
from stages.batch import Batch, jsons
from stages.judge import import_call

FOLDER = "cache/questions"
KEY = "judge.decompose"

REMEMBERED = 16_384
"""Prompts whose facts a process keeps in memory."""

Facts = tuple[Fact, ...]


@dataclass(frozen=True)
class DecomposePrompts:
    """Reads `prompt`; adds `decomposed`, a JSON list of {question, needs} for each sample; empty where there is none.

    A prompt is decomposed once: what `model` wrote is kept below `cache/questions/` of the dataset, and all of the prompt's
    samples, resumed runs and later judges are asked that. Decoding is greedy. An answer that does not parse is none, is
    counted in the log and is kept too.

    `call` ('module:function') takes a list of prompts and returns a list of questions for each: texts, asked as they are
    with {media} filled in, or {question, needs: places of questions before it}.
    """

    fingerprint: str  # of all that the facts depend on
    model: LanguageRef | None = None
    call: str | None = None
    instruction: str = INSTRUCTION
    max_questions: int = 12
    max_new_tokens: int = 768
    cache: Storage | None = None
    threads: int = 1

    name: ClassVar[str] = "decompose"
    reads: ClassVar[tuple[str, ...]] = ("prompt",)
    adds: ClassVar[tuple[str, ...]] = ("decomposed",)
    skips_rejected: ClassVar[bool] = True

    def load(self) -> None:
        if self.model is None:
            import_call(self.call or "", f"{KEY}.call")
            return
        import torch

        torch.set_num_threads(self.threads)
        load_language(self.model)

    def __call__(self, batch: Batch) -> Batch:
        known = _remembered(self)
        prompts = [str(prompt) for prompt in batch["prompt"]]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if len(known) + len(new) > REMEMBERED:
            known.clear()
            new = list(dict.fromkeys(prompts))
        if new:
            known.update(
                zip(new, self._called(new) if self.model is None else self._kept(new, self.model), strict=True)
            )
        return batch | {"decomposed": jsons([[asdict(fact) for fact in known[prompt]] for prompt in prompts])}

    def _kept(self, prompts: list[str], model: LanguageRef) -> list[Facts]:
        """What the cache holds of the prompts; the model is asked for the rest."""
        found = {prompt: self._recall(prompt) for prompt in prompts}
        missing = [prompt for prompt, facts in found.items() if facts is None]
        answers = load_language(model).answer(missing, self.instruction, self.max_new_tokens) if missing else []
        bad: list[str] = []
        for prompt, answer in zip(missing, answers, strict=True):
            try:
                facts = parse_facts(answer)[: self.max_questions]
            except ValueError as error:
                facts = ()
                bad.append(str(error))
            found[prompt] = facts
            if self.cache is not None:
                data = {"prompt": prompt, "facts": [asdict(fact) for fact in facts], "answer": answer}
                self.cache.write_bytes(self._name(prompt), json.dumps(data).encode())
        if bad:
            log().warning(
                "prompts are asked about as a whole: the language model's answer does not parse",
                prompts=len(bad),
                of=len(missing),
                first=bad[0],
            )
        return [found[prompt] or () for prompt in prompts]

    def _name(self, prompt: str) -> str:
        key = json.dumps([self.fingerprint, prompt])
        return f"{FOLDER}/{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _recall(self, prompt: str) -> Facts | None:
        """What is kept of a prompt; an object that is broken holds nothing."""
        if self.cache is None:
            return None
        try:
            data = json.loads(self.cache.read_bytes(self._name(prompt)))
            return _facts(data["facts"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _called(self, prompts: list[str]) -> list[Facts]:
        key = f"{KEY}.call"
        found = import_call(self.call or "", key)(prompts)
        if not isinstance(found, (list, tuple)) or len(found) != len(prompts):
            what = f"{len(found)}" if isinstance(found, (list, tuple)) else type(found).__name__
            raise UserError(f"{key}: {self.call}: expected {len(prompts)} lists of questions, found {what}")
        try:
            return [_facts(each)[: self.max_questions] for each in found]
        except (ValueError, TypeError) as error:
            raise UserError(f"{key}: {self.call}: {error}") from error


def _facts(values: Sequence[Any]) -> Facts:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"expected a list of questions, found {type(values).__name__}")
    return tuple(Fact.of(value, place) for place, value in enumerate(values))


@functools.cache
def _remembered(stage: DecomposePrompts) -> dict[str, Facts]:
    """Prompt -> facts, of a stage with these settings in this process."""
    return {}
