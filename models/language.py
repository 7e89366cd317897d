"""Prompt expansion by a causal language model of transformers, in process."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.errors import UserError
from models.placement import device_of, dtype_of, quiet

if TYPE_CHECKING:
    import torch

TOKENS_PER_FORWARD = 32768
"""Most padded tokens in one forward pass: what bounds memory, whatever the batch."""

_QUOTES = "\"'`“”‘’«»"
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
                self.tokenizer = AutoTokenizer.from_pretrained(ref.path)
                model = AutoModelForCausalLM.from_pretrained(ref.path, dtype=dtype_of(ref.dtype, self.device))
            except Exception as error:
                raise UserError(
                    f"{ref.path}: cannot be loaded as a language model ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:300]}); expected a checkpoint that transformers' "
                    "AutoModelForCausalLM takes"
                ) from error
        self.model = model.to(self.device).eval()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._control = [token for token in self.tokenizer.get_added_vocab() if token.strip()]

    def expand(
        self, prompts: list[str], instruction: str, variants: int, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[str]]:
        """`variants` rewritings of each prompt, in the order of `prompts`.

        `instruction` contains {prompt}. At `temperature` 0 the most likely text is taken, and all variants are equal. Each
        text is stripped of quotes, labels and line breaks; where nothing is left, the prompt itself stands in.
        """
        rows = [(prompt, variant) for prompt in prompts for variant in range(variants)]
        conversations = [self._conversation(instruction, prompt) for prompt, _ in rows]
        noise = (
            np.stack([_uniform(seed, prompt, variant, max_new_tokens) for prompt, variant in rows]) if rows else None
        )
        texts: list[str] = []
        while len(texts) < len(rows):
            start = len(texts)
            inputs = self._inputs(conversations[start:], max_new_tokens)
            here = slice(start, start + len(inputs["input_ids"]))
            texts.extend(self._answer(inputs, temperature, max_new_tokens, noise[here]))  # type: ignore[index]
        cleaned = [clean(text) or prompt for text, (prompt, _) in zip(texts, rows, strict=True)]
        return [cleaned[start : start + variants] for start in range(0, len(cleaned), variants)]

    def _conversation(self, instruction: str, prompt: str) -> str:
        for token in self._control:  # a prompt that spells a control token must not open a turn
            prompt = prompt.replace(token, " ")
        text = instruction.replace("{prompt}", prompt)
        if self.tokenizer.chat_template is None:
            return f"{text}\n"
        messages = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )

    def _inputs(self, conversations: list[str], max_new_tokens: int) -> Any:
        """The first of `conversations`, as many as `TOKENS_PER_FORWARD` allows, padded on the left."""
        encoded = self.tokenizer(conversations, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"]
        longest, rows = 0, 0
        for tokens in encoded:
            longest = max(longest, len(tokens) + max_new_tokens)
            if rows and longest * (rows + 1) > TOKENS_PER_FORWARD:
                break
            rows += 1
        return self.tokenizer.pad({"input_ids": encoded[:rows]}, return_tensors="pt").to(self.device)

    def _answer(self, inputs: Any, temperature: float, max_new_tokens: int, noise: np.ndarray) -> list[str]:
        import torch
        from transformers import LogitsProcessorList

        length = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList([_Draw(temperature, noise, length)] if temperature > 0 else [])
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                logits_processor=processors,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)


class _Draw:
    """Samples inside a greedy decode: each row's next token is where its own uniform number falls in its distribution.

    transformers' sampling draws from one generator for the whole batch, which makes a row depend on its neighbours.
    """

    def __init__(self, temperature: float, noise: np.ndarray, prompt_length: int) -> None:
        import torch

        self.temperature = temperature
        self.noise = torch.from_numpy(noise)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        step = input_ids.shape[1] - self.prompt_length
        mass = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)
        point = self.noise[:, step, None].to(mass) * mass[:, -1:]
        drawn = torch.searchsorted(mass, point, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _uniform(seed: int, prompt: str, variant: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1), from numpy's Philox keyed by what the row is."""
    text = f"{seed}\0{variant}\0{prompt}".encode(errors="surrogatepass")
    key = int(hashlib.blake2b(text, digest_size=16).hexdigest(), 16)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def clean(text: str) -> str:
    """A model's answer as a prompt: one line, without preamble, label, surrounding quotes or thoughts."""
    text = _THOUGHT.sub(" ", text).strip()
    text = _LABEL.sub("", _PREAMBLE.sub("", text))
    return " ".join(text.split()).strip(_QUOTES + " *").strip()
