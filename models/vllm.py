"""Judging and captioning by vLLM on a GPU.

The same methods and the same answers as `models.multimodal.Multimodal`: the same chat template and token ids, the same tokens
that spell Yes and No, whose log-probabilities vLLM gives for just those ids. The frames come first and the question last, and
a clip's first question is answered before the others are sent: vLLM keeps the keys and values of a prompt's blocks (its
automatic prefix caching), so a clip is read once.

This module speaks to an engine that takes requests and gives answers as dictionaries, those of the engine stage of Ray's
`ray.data.llm`; stages.vllm_engine starts it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from models.conversation import load_conversation
from models.gumbel import key_of
from models.structured import JSON_TIMES, parsed

FAILED = "__inference_error__"
"""Why a request has no answer, in the answer's dictionary; empty where it has one."""
SEEDS = 1 << 63


class Engine(Protocol):
    """vLLM with a model loaded. One call at a time."""

    def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers to the requests, in their order.

        A request has tokenized_prompt (token ids, a placeholder for each image), multimodal_data ({"image": images}),
        mm_processor_kwargs and sampling_params (arguments of vLLM's SamplingParams; structured_outputs is a dictionary of
        its StructuredOutputsParams). An answer has generated_text, logprobs ({token id: {"logprob": float}} for each new
        token) and FAILED.
        """


@dataclass(frozen=True)
class VllmRef:
    """Which model, and how vLLM is to hold it: picklable, and the key under which a process keeps it loaded.

    Args:
        path: local folder in transformers' checkpoint format.
        start: starts the engine of this reference.
        tensor_parallel_size: GPUs of one node that the model lies over.
        gpu_memory_utilization: share of each GPU's memory that vLLM takes; None: nine tenths of the actor's share of it.
        max_model_len: tokens of question and answer at most; None: as many as the model reads.
        section: of the spec, for errors.
    """

    path: str
    start: Callable[[VllmRef], Engine]
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    section: str = field(default="judge", compare=False)


@functools.cache
def load_vllm(ref: VllmRef) -> Vllm:
    """The model of `ref`, loaded once for each process. UserError where vLLM, a GPU or such a model is not there."""
    return Vllm(ref)


Parameters = Callable[[np.ndarray, str], dict[str, Any]]
"""vLLM's sampling parameters for a clip and a text."""


class Vllm:
    """A model in vLLM.

    Its methods raise ValueError where vLLM refuses a request, such as one that is longer than the model reads.
    """

    def __init__(self, ref: VllmRef) -> None:
        self.ref = ref
        self.conversation = load_conversation(ref.path, f"{ref.section}.model")
        self._yes, self._no = (self.conversation.spelled(word) for word in ("Yes", "No"))
        self._engine = ref.start(ref)

    def p_yes(self, frames: np.ndarray, questions: list[list[str]]) -> np.ndarray:
        """The probability of "Yes" over "Yes" and "No" at the first position of the answer.

        `frames` is uint8 [n, T, H, W, 3] (images: T = 1), `questions` holds at most q texts for each clip. Returns
        float32 [n, q]; NaN where a clip has fewer, or the model's logits are not finite.
        """
        wanted = [*self._yes, *self._no]
        found = self._answers(
            frames, questions, lambda *_: {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": wanted}
        )
        p_yes = np.full((len(frames), max(map(len, questions), default=0)), np.nan, dtype=np.float32)
        for clip, row in enumerate(found):
            p_yes[clip, : len(row)] = [self._p_yes(answer["logprobs"][0]) for answer in row]
        return p_yes

    def answer(
        self, frames: np.ndarray, texts: list[list[str]], max_new_tokens: int, temperature: float = 0.0
    ) -> list[list[str]]:
        """Greedy answers to the texts asked of each clip; at a temperature above 0 drawn, with a seed that is a clip's and
        text's own."""
        found = self._answers(frames, texts, _free(max_new_tokens, temperature))
        return [[" ".join(str(answer["generated_text"]).split()) for answer in row] for row in found]

    def structured(
        self,
        frames: np.ndarray,
        instruction: str,
        schema: Mapping[str, Any],
        max_new_tokens: int,
        temperature: float = 0.0,
    ) -> list[Any]:
        """What each clip's answer to the instruction says as JSON, whose tokens vLLM holds to `schema`; None where it was
        cut off. It may have `JSON_TIMES` as many tokens."""
        free = _free(JSON_TIMES * max_new_tokens, temperature)
        guided = {"structured_outputs": {"json": dict(schema)}}
        found = self._answers(frames, [[instruction]] * len(frames), lambda clip, text: {**free(clip, text), **guided})
        return [parsed(row[0]["generated_text"]) for row in found]

    def _answers(
        self, frames: np.ndarray, texts: list[list[str]], parameters: Parameters
    ) -> list[list[dict[str, Any]]]:
        """Answers to the texts asked of each clip: the first of each clip before the others."""
        images = [_images(clip) if row else [] for clip, row in zip(frames, texts, strict=True)]
        found: list[list[dict[str, Any]]] = [[] for _ in texts]
        for places in (slice(1), slice(1, None)):
            asked = [(clip, text) for clip, row in enumerate(texts) for text in row[places]]
            requests = [self._request(images[clip], text, parameters(frames[clip], text)) for clip, text in asked]
            answers = self._engine(requests) if requests else []
            for (clip, _), answer in zip(asked, answers, strict=True):
                if failed := answer.get(FAILED):
                    raise ValueError(f"{self.ref.path}: vLLM refuses a request ({failed})")
                found[clip].append(answer)
        return found

    def _request(self, images: list[Any], text: str, parameters: dict[str, Any]) -> dict[str, Any]:
        return {
            "tokenized_prompt": self.conversation.token_ids(len(images), text),
            "multimodal_data": {"image": images},
            "mm_processor_kwargs": self.conversation.image_options(len(images)),
            "sampling_params": parameters,
        }

    def _p_yes(self, logprobs: Mapping[int, Mapping[str, Any]]) -> float:
        yes, no = (np.logaddexp.reduce([logprobs[token]["logprob"] for token in ids]) for ids in (self._yes, self._no))
        with np.errstate(invalid="ignore"):  # -inf - -inf: neither can be said, NaN
            return float(1 / (1 + np.exp(no - yes)))


def _free(max_new_tokens: int, temperature: float) -> Parameters:
    """Parameters of a text."""
    greedy = {"temperature": temperature, "max_tokens": max_new_tokens}
    if not temperature:
        return lambda *_: dict(greedy)
    return lambda clip, text: {**greedy, "seed": key_of(clip, text) % SEEDS}


def _images(clip: np.ndarray) -> list[Any]:
    """Frames, uint8 [T, H, W, 3], as pictures."""
    from PIL import Image

    return [Image.fromarray(frame) for frame in clip]
