"""EncodeText: prompts become the tensors that a generator's denoiser is conditioned on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.shard import safetensors_of
from models.generator import Generator, GeneratorRef, load_generator
from models.inputs import InputError, first_frame
from models.plan import SamplerPlan
from models.scenes import scenes_of
from models.text import encoding_of, text_of
from stages.batch import Batch, size, texts

PREFIX = "cond."
LONGEST_PROMPT = 20_000
"""Characters. No text encoder reads as many; a record that holds more is a mistake."""


@dataclass(frozen=True)
class EncodeText:
    """Adds `cond.*`: for each sample, what its generator's pipeline takes as embeddings, masks and first frame.

    With `keep_text`, a dtype, also `text` and `negative_text`: a safetensors file of that dtype with the same, unpadded (see
    `models.text.text_of`), and what made it in its metadata; and its id, `text_id` and `negative_text_id`. Samples that
    share a text share its bytes. Where there is no guidance there is no negative text, and these are empty.

    A pipeline that runs whole adds nothing. Fails samples as `empty_prompt`, `bad_text` (not valid Unicode),
    `prompt_too_long`, `too_many_scenes` (more than the video has blocks), `bad_input` (an input that is missing or
    unreadable) and `bad_embeddings` (which do not fit `keep_text`). What was found when the records were read stands in
    `extra`: `bad_text` true, `bad_input` with the reason.
    """

    generators: tuple[GeneratorRef, ...]
    plan: SamplerPlan
    batch_size: int
    threads: int = 1
    keep_text: str = ""

    name: ClassVar[str] = "encode"
    reads: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "inputs",
        "extra",
        "generator",
        "height",
        "width",
        "num_frames",
    )
    adds: ClassVar[tuple[str, ...]] = ("cond.*",)
    skips_rejected: ClassVar[bool] = False

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        for ref in self.generators:
            load_generator(ref).load("encode")

    def __call__(self, batch: Batch) -> Batch:
        generator = load_generator(self.generators[int(batch["generator"][0])])
        problems = [
            _problem(prompt, negative, json.loads(extra or "{}"))
            for prompt, negative, extra in zip(batch["prompt"], batch["negative_prompt"], batch["extra"], strict=True)
        ]
        if self.plan.scenes is not None:
            blocks = generator.blocks(self.plan, int(batch["num_frames"][0])).count
            for row, prompt in enumerate(batch["prompt"]):
                if not problems[row] and (found := len(scenes_of(prompt, self.plan.scenes[0]))) > blocks:
                    problems[row] = ("too_many_scenes", f"the prompt has {found} scenes and the video {blocks} blocks")
        images: list[np.ndarray | None] = [None] * size(batch)
        if generator.family is not None and generator.family.inputs:
            height, width = int(batch["height"][0]), int(batch["width"][0])
            for row, text in enumerate(batch["inputs"]):
                if problems[row]:  # what may not be opened is not
                    continue
                try:
                    images[row] = first_frame(json.loads(text or "[]"), height, width)
                except InputError as error:
                    problems[row] = ("bad_input", str(error))
        result = dict(batch)
        if any(problems):
            blamed = zip(problems, batch["error_type"], batch["error"], strict=True)
            marks = [problem or (kind, text) for problem, kind, text in blamed]
            result["error_type"] = texts([kind for kind, _ in marks])
            result["error"] = texts([text for _, text in marks])
        good = np.array([row for row, problem in enumerate(problems) if not problem], dtype=np.int64)
        if generator.family is not None and len(good):
            result |= self._encode(generator, batch, images, good)
            if self.keep_text:
                self._add_texts(generator, result, good)
        return result

    def _add_texts(self, generator: Generator, batch: Batch, rows: np.ndarray) -> None:
        """Add what is kept of the texts of `rows`."""
        assert generator.family is not None
        encoding = encoding_of(generator, self.plan)
        conditions = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
        known: dict[str, bytes] = {}
        for negative, prefix in ((False, ""), (True, "negative_")):
            ids, files = texts([""] * size(batch)), texts([""] * size(batch))
            for row in rows:
                kept = text_of(generator.family, conditions, row, negative)
                if not kept:
                    continue
                text_id = encoding.text_id(str(batch[f"{prefix}prompt"][row] or ""), negative)
                try:
                    if text_id not in known:
                        known[text_id] = safetensors_of(kept, self.keep_text, encoding.as_metadata())
                    ids[row], files[row] = text_id, known[text_id]
                except ValueError as error:
                    batch["error_type"] = _with(batch["error_type"], row, "bad_embeddings")
                    batch["error"] = _with(batch["error"], row, f"{error}; output.tensors.text_embeddings may be wider")
            batch[f"{prefix}text_id"], batch[f"{prefix}text"] = ids, files

    def _encode(self, generator: Generator, batch: Batch, images: list[Any], good: np.ndarray) -> Batch:
        rows = padded(good, self.batch_size)
        conditions = generator.encode(
            [str(batch["prompt"][row]) for row in rows],
            [str(batch["negative_prompt"][row]) for row in rows],
            [images[row] for row in rows if images[row] is not None],
            self.plan,
        )
        columns = {}
        for name, value in conditions.items():
            column = np.zeros((size(batch), *value.shape[1:]), dtype=value.dtype)
            column[good] = value[: len(good)]
            columns[PREFIX + name] = column
        return columns


def padded(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """`rows`, filled up with the first of them: torch's last bits depend on the size of a batch."""
    missing = max(0, batch_size - len(rows))
    return np.concatenate([rows, np.repeat(rows[:1], missing)])


def _with(column: np.ndarray, row: int, value: str) -> np.ndarray:
    changed = column.copy()
    changed[row] = value
    return changed


def _problem(prompt: Any, negative_prompt: Any, extra: dict[str, Any]) -> tuple[str, str] | None:
    if not str(prompt or "").strip():
        return "empty_prompt", "the prompt is empty"
    if extra.get("bad_text") is True:
        return "bad_text", "the record's text is not valid UTF-8; its bytes are shown as \\xNN"
    if isinstance(extra.get("bad_input"), str):
        return "bad_input", extra["bad_input"]
    for name, text in (("prompt", str(prompt)), ("negative_prompt", str(negative_prompt or ""))):
        if len(text) > LONGEST_PROMPT:
            return "prompt_too_long", f"the {name} has {len(text):,} characters; at most {LONGEST_PROMPT:,} are read"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return "bad_text", f"the {name} is not valid Unicode at character {error.start}"
    return None
