"""What Ray's engine stage uses of vLLM, with its arguments and no others, answered by transformers on this machine.

`vllm_signatures.json` has the names of arguments of the release that Ray asks for, read from its wheel.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

SIGNATURES: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_signatures.json").read_text())
MOST_TOKEN_IDS = 128


class VLLMValidationError(Exception):
    """vLLM's own is no ValueError either."""


def _known(name: str, given: dict[str, Any]) -> SimpleNamespace:
    unknown = set(given) - set(SIGNATURES[name])
    if unknown:
        raise TypeError(f"{name}: unexpected {', '.join(sorted(unknown))}")
    return SimpleNamespace(**given)


class _Arguments:
    """A class of vLLM's that is made of keyword arguments."""

    def __init__(self, **given: Any) -> None:
        self.__dict__ |= vars(_known(type(self).__name__, given))


class StructuredOutputsParams(_Arguments):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        kinds = {"json", "regex", "choice", "grammar", "json_object", "structural_tag"} & set(given)
        if len(kinds) != 1:
            raise VLLMValidationError("one kind of structured outputs, please")


class SamplingParams(_Arguments):
    temperature = 1.0
    max_tokens = 16
    seed: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logprob_token_ids: list[int] | None = None

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if not 0 <= self.temperature <= 2 or self.max_tokens < 1:
            raise VLLMValidationError("temperature or max_tokens is out of bounds")
        if len(self.logprob_token_ids or ()) > MOST_TOKEN_IDS:
            raise VLLMValidationError("too many logprob_token_ids")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise OverflowError("seed")


class TokensPrompt(dict[str, Any]):
    def __init__(self, **given: Any) -> None:
        super().__init__(vars(_known("TokensPrompt", given)))


class TextPrompt(dict[str, Any]):
    def __init__(self, **_: Any) -> None:
        raise AssertionError("prompts are sent as token ids")


class AsyncEngineArgs(_Arguments):
    model: str
    max_model_len: int | None = None

    def create_engine_config(self, usage_context: Any = None, headless: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=256),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        )


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(_Arguments):
    """Its text, token ids and log-probabilities."""


class RequestOutput(_Arguments):
    """Its request and what came of it."""


class AsyncLLMEngine:
    """Keeps what it was made with and asked, newest engine last in `engines`."""

    engines: list[AsyncLLMEngine] = []  # noqa: RUF012

    def __init__(self, arguments: AsyncEngineArgs) -> None:
        from models.multimodal import Multimodal, MultimodalRef

        self.arguments, self.asked = arguments, list[tuple[TokensPrompt, SamplingParams]]()
        self._model = Multimodal(MultimodalRef(arguments.model))
        self.engines.append(self)

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs, **given: Any) -> AsyncLLMEngine:
        _known("AsyncLLM.from_engine_args", given)
        return cls(engine_args)

    async def generate(
        self, prompt: TokensPrompt, sampling_params: SamplingParams, request_id: str, **given: Any
    ) -> AsyncIterator[RequestOutput]:
        _known("AsyncLLM.generate", given)
        self.asked.append((prompt, sampling_params))
        yield self._output(prompt, sampling_params, request_id)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to end."""

    def _output(self, prompt: TokensPrompt, params: SamplingParams, request_id: str) -> RequestOutput:
        images = prompt["multi_modal_data"]["image"]
        inputs = self._inputs(prompt["prompt_token_ids"], images, prompt["mm_processor_kwargs"])
        length = inputs["input_ids"].shape[1]
        limit = self.arguments.max_model_len
        if limit is not None and length + 1 > limit:
            raise VLLMValidationError(f"The prompt has {length} tokens, and max_model_len is {limit}")
        if params.structured_outputs is not None:
            clip = np.stack([np.asarray(image) for image in images])[None]
            (value,) = self._model.structured(clip, "", params.structured_outputs.json, params.max_tokens)
            tokens, text, logprobs = [], json.dumps(value), None
        else:
            tokens, logits = self._generated(inputs, params)
            text = self._model.tokenizer.decode(tokens, skip_special_tokens=True)
            logprobs = _logprobs(tokens, logits, params.logprob_token_ids)
        made = CompletionOutput(index=0, text=text, token_ids=tokens, logprobs=logprobs, finish_reason="stop")
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=inputs["input_ids"][0].tolist(),
            prompt_logprobs=None,
            outputs=[made],
            finished=True,
            metrics=None,
        )

    def _inputs(self, ids: list[int], images: list[Any], options: dict[str, Any] | None) -> Any:
        """As vLLM reads a prompt of token ids: each placeholder becomes all that the processor writes of an image."""
        model, processor = self._model, self._model.processor
        placeholder = model.model.config.image_token_id
        assert ids.count(placeholder) == len(images)
        alone = {"text": processor.image_token, "images": images[:1], "add_special_tokens": False}
        written = processor(**alone, **(options or {}))["input_ids"][0]
        expanded = [token for one in ids for token in (written if one == placeholder else [one])]
        pixels = processor.image_processor(images, return_tensors="pt", **(options or {}))
        return {**pixels, "input_ids": torch.tensor([expanded])}

    def _generated(self, inputs: dict[str, Any], params: SamplingParams) -> tuple[list[int], torch.Tensor]:
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None}
        if params.temperature:
            assert params.seed is not None, "what is drawn has a seed"
            torch.manual_seed(params.seed)
            drawn = {"do_sample": True, "temperature": params.temperature}
        with torch.inference_mode():
            output = self._model.model.generate(
                **inputs,
                **drawn,
                top_k=None,
                top_p=None,
                max_new_tokens=params.max_tokens,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=self._model.tokenizer.pad_token_id,
            )
        return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(output.logits)


def _logprobs(tokens: list[int], logits: torch.Tensor, wanted: list[int] | None) -> list[dict[int, Logprob]] | None:
    if wanted is None:
        return None
    rows = torch.log_softmax(logits.float(), dim=-1)
    return [
        {token: Logprob(float(row[token])) for token in (made, *wanted)} for made, row in zip(tokens, rows, strict=True)
    ]


def modules() -> dict[str, ModuleType]:
    """The package, for sys.modules."""
    names = ("vllm", "vllm.inputs", "vllm.inputs.llm", "vllm.outputs", "vllm.sampling_params", "vllm.exceptions")
    made = {name: ModuleType(name) for name in names}
    root = made["vllm"]
    root.__path__ = []
    for name, value in vars(sys.modules[__name__]).items():
        if isinstance(value, type):
            for module in made.values():
                setattr(module, name, value)
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(made[parent], child, made[name])
    made["vllm.outputs"].PoolingRequestOutput = type("PoolingRequestOutput", (), {})  # type: ignore[attr-defined]
    root.__version__ = SIGNATURES["version"]  # type: ignore[attr-defined]
    return made
