"""Prompt expansion and other answers by a causal language model of transformers, in process."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infra.errors import UserError
from models.chat import control_tokens, explain, plain_text, prepare, starts_itself
from models.placement import device_of, dtype_of, quiet
from models.weights import refuse_missing

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, LogitsProcessor

TOKENS_PER_FORWARD = 32768
"""Most padded tokens in one forward pass: what bounds memory, whatever the batch."""

_QUOTES = tuple(zip("\"'`“‘«", "\"'`”’»", strict=True))
_PREAMBLE = re.compile(r"^(?:\W*(?:here is|here's|sure|certainly|of course)\b[^:\n]{0,80}:)", re.IGNORECASE)
_LABEL = re.compile(
    r"^\W*(?:(?:rewritten|expanded|enhanced|improved|new|final|video|detailed)\s+)*prompt\W*:\s*", re.IGNORECASE
)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)


@dataclass(frozen=True)
class LanguageRef:
    """Which model: picklable, and the key under which a process keeps it loaded."""

    path: str  # local folder in transformers' checkpoint format
    dtype: str = "auto"  # bfloat16 on an accelerator, float32 on a CPU
    device: str = "auto"
    revision: str | None = None
    key: str = "prompts.expand.model"  # of the spec, for messages


@functools.cache
def load_language(ref: LanguageRef) -> Language:
    """The model of `ref`, loaded once for each process. Raises UserError where the folder holds no such model."""
    return Language(ref)


class Language:
    """A loaded model. A prompt's expansions depend on it, the seed and the settings, not on the prompts beside it."""

    def __init__(self, ref: LanguageRef) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.ref = ref
        self.device = device_of(ref.device)
        with quiet():
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(ref.path, trust_remote_code=False)
                model, info = AutoModelForCausalLM.from_pretrained(
                    ref.path,
                    dtype=dtype_of(ref.dtype, self.device),
                    output_loading_info=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
            except Exception as error:
                raise UserError(
                    f"{ref.key}: {ref.path}: cannot be loaded as a language model ({explain(error)}); "
                    "expected a checkpoint for transformers' AutoModelForCausalLM"
                ) from error
        refuse_missing(info["missing_keys"], ref.key, ref.path)
        self.model = model.to(self.device).eval()
        self.cuts = _cuts(self.model.generation_config)
        self.context = min(
            getattr(self.model.config, "max_position_embeddings", TOKENS_PER_FORWARD), TOKENS_PER_FORWARD
        )
        prepare(self.tokenizer)
        self._control = control_tokens(self.tokenizer)

    def expand(
        self, prompts: list[str], instruction: str, variants: int, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        """`variants` rewritings of each prompt, in the order of `prompts`.

        `instruction` contains {prompt}. At `temperature` 0 the most likely text is taken, and all variants are equal. Each
        text is one line, without quotes and labels. Where nothing is left, or a prompt is longer than the model
        reads or has no words that could be rewritten, the prompt itself stands in.
        """
        conversations = [self._tokens(instruction, prompt) for prompt in prompts]
        rows = [
            (at, variant)
            for at, tokens in enumerate(conversations)
            for variant in range(variants)
            if prompts[at].strip() and len(tokens) + max_new_tokens <= self.context
        ]
        expansions = [[prompt] * variants for prompt in prompts]
        for chunk in _chunks(rows, [len(tokens) + max_new_tokens for tokens in conversations]):
            noise = np.stack([_uniform(seed, prompts[at], variant, max_new_tokens) for at, variant in chunk])
            answers = self._answer([conversations[at] for at, _ in chunk], temperature, noise)
            for (at, variant), answer in zip(chunk, answers, strict=True):
                expansions[at][variant] = clean(answer) or prompts[at]
        return expansions

    def answer(self, prompts: list[str], instruction: str, max_new_tokens: int) -> list[str]:
        """The greedy answer to `instruction`, which contains {prompt}, for each prompt, as it was written but for thoughts.

        Empty for a prompt that is longer than the model reads.
        """
        conversations = [self._tokens(instruction, prompt) for prompt in prompts]
        lengths = [len(tokens) + max_new_tokens for tokens in conversations]
        answers = [""] * len(prompts)
        for chunk in _chunks([(at, 0) for at, length in enumerate(lengths) if length <= self.context], lengths):
            found = self._answer([conversations[at] for at, _ in chunk], 0, np.zeros((len(chunk), max_new_tokens)))
            for (at, _), text in zip(chunk, found, strict=True):
                answers[at] = _THOUGHT.sub(" ", text).strip()
        return answers

    def _tokens(self, instruction: str, prompt: str) -> list[int]:
        text = instruction.replace("{prompt}", plain_text(prompt, self._control))
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(f"{text}\n")
        conversation = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return self.tokenizer.encode(
            conversation, add_special_tokens=not starts_itself(self.tokenizer, conversation), verbose=False
        )

    def _answer(self, conversations: list[list[int]], temperature: float, noise: np.ndarray) -> list[str]:
        """One answer to each conversation. `noise` is [n, max_new_tokens], each row's own uniform numbers."""
        import torch
        from transformers import LogitsProcessorList

        inputs = self.tokenizer.pad({"input_ids": conversations}, return_tensors="pt").to(self.device)
        length = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList([_Draw(temperature, self.cuts, noise, length)] if temperature > 0 else [])
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                logits_processor=processors,
                max_new_tokens=noise.shape[1],
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)


def _cuts(sampling: GenerationConfig) -> list[LogitsProcessor]:
    """What a checkpoint's generation_config leaves out of its distribution at a temperature: top_k, top_p, min_p."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found: list[LogitsProcessor] = []
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and 0 < sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


class _Draw:
    """Samples inside a greedy decode: each row's next token is where its own uniform number falls in its distribution.

    transformers' sampling draws from one generator for the whole batch, which makes a row depend on its neighbours.
    """

    def __init__(self, temperature: float, cuts: list[LogitsProcessor], noise: np.ndarray, prompt_length: int) -> None:
        import torch

        self.temperature = temperature
        self.cuts = cuts
        self.noise = torch.from_numpy(noise)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        step = input_ids.shape[1] - self.prompt_length
        likely = scores.double() / self.temperature
        for cut in self.cuts:
            likely = cut(input_ids, likely)
        mass = torch.softmax(likely, dim=-1).cumsum(dim=-1)
        point = self.noise[:, step, None].to(mass) * mass[:, -1:]
        drawn = torch.searchsorted(mass, point, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _chunks(rows: list[tuple[int, int]], lengths: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Rows (prompt, variant) in order, as many at once as `TOKENS_PER_FORWARD` allows once they are padded."""
    chunk: list[tuple[int, int]] = []
    for row in rows:
        longest = max(lengths[at] for at, _ in [*chunk, row])
        if chunk and longest * (len(chunk) + 1) > TOKENS_PER_FORWARD:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _uniform(seed: int, prompt: str, variant: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1), from numpy's Philox keyed by what the row is."""
    text = f"{seed}\0{variant}\0{prompt}".encode(errors="surrogatepass")
    key = int(hashlib.blake2b(text, digest_size=16).hexdigest(), 16)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def clean(text: str) -> str:
    """A model's answer as a prompt: one line, without preamble, label, surrounding quotes or thoughts."""
    text = _THOUGHT.sub(" ", text).strip()
    text = _LABEL.sub("", _PREAMBLE.sub("", text))
    text = " ".join(text.split()).strip("* ")
    for opening, closing in _QUOTES:
        inner = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and closing not in inner:
            text = inner.strip()
    return text
