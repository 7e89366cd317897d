"""Judging and captioning by a multimodal model of transformers, in process.

A clip is shown as a series of images, which every image-text-to-text family takes; the frames come first in the
conversation and the question last, so that all questions about a clip share a prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.errors import UserError
from models.chat import control_tokens, explain, plain_text, prepare, starts_itself
from models.placement import device_of, dtype_of, quiet
from models.weights import refuse_missing

if TYPE_CHECKING:
    import torch

TOKENS_PER_FORWARD = 32768
"""Most padded tokens in one forward pass: what bounds memory, whatever the batch."""


@dataclass(frozen=True)
class MultimodalRef:
    """Which model: picklable, and the key under which a process keeps it loaded."""

    path: str  # local folder in transformers' checkpoint format
    dtype: str = "auto"  # bfloat16 on an accelerator, float32 on a CPU
    device: str = "auto"
    revision: str | None = None


@functools.cache
def load_multimodal(ref: MultimodalRef) -> Multimodal:
    """The model of `ref`, loaded once for each process. Raises UserError where the folder holds no such model."""
    return Multimodal(ref)


def evenly_spaced(frames: np.ndarray, num_frames: int) -> np.ndarray:
    """At most `num_frames` frames of clips [n, T, H, W, 3], evenly spaced, the first and the last among them."""
    total = frames.shape[1]
    if total <= num_frames:
        return frames
    return frames[:, np.linspace(0, total - 1, num_frames).round().astype(int)]


class Multimodal:
    """A loaded model. Answers for a clip do not depend on the clips beside it, beyond float tolerance."""

    def __init__(self, ref: MultimodalRef) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.ref = ref
        self.device = device_of(ref.device)
        with quiet():
            try:
                self.processor = AutoProcessor.from_pretrained(ref.path, trust_remote_code=False)
                model, info = AutoModelForImageTextToText.from_pretrained(
                    ref.path,
                    dtype=dtype_of(ref.dtype, self.device),
                    output_loading_info=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
            except Exception as error:
                hint = (
                    ""
                    if find_spec("torchvision")
                    else "; this environment has no torchvision, which Qwen-VL and SmolVLM need"
                )
                raise UserError(
                    f"judge.model, caption.model: {ref.path}: cannot be loaded as a multimodal model ({explain(error)}); "
                    f"expected a checkpoint for transformers' AutoModelForImageTextToText{hint}"
                ) from error
        refuse_missing(info["missing_keys"], "judge.model, caption.model", ref.path)
        if self.processor.chat_template is None:
            raise UserError(
                f"judge.model, caption.model: {ref.path}: its processor has no chat template; add chat_template.jinja"
            )
        self.model = model.to(self.device).eval()
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.tokenizer = self.processor.tokenizer
        prepare(self.tokenizer)
        self._control = control_tokens(self.tokenizer)
        self._yes, self._no = self._answers("Yes"), self._answers("No")

    def p_yes(self, frames: np.ndarray, questions: list[list[str]]) -> np.ndarray:
        """The probability of "Yes" over "Yes" and "No" at the first position of the answer.

        `frames` is uint8 [n, T, H, W, 3] (images: T = 1), `questions` holds q texts for each clip. Returns
        float32 [n, q]; NaN where the model's logits are not finite. Raises ValueError where a question and the frames
        are more than the model reads.
        """
        import torch

        answers = [torch.empty(0, 2)]
        for inputs in self._batches(frames, questions, max_new_tokens=1):
            logits = self._generate(inputs, 1, output_logits=True, return_dict_in_generate=True).logits[0].float()
            pair = [torch.logsumexp(logits[:, tokens], dim=-1) for tokens in (self._yes, self._no)]
            answers.append(torch.stack(pair, dim=-1).cpu())
        probabilities = torch.softmax(torch.cat(answers), dim=-1)[:, 0]
        return probabilities.numpy().astype(np.float32).reshape(len(frames), len(questions[0]) if questions else 0)

    def caption(self, frames: np.ndarray, instructions: list[str], max_new_tokens: int) -> list[list[str]]:
        """Greedy answers to each instruction, for each clip: n lists of len(instructions) texts.

        `frames` is uint8 [n, T, H, W, 3].
        """
        texts: list[str] = []
        for inputs in self._batches(frames, [instructions] * len(frames), max_new_tokens):
            tokens = self._generate(inputs, max_new_tokens)[:, inputs["input_ids"].shape[1] :]
            decoded = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            texts.extend(" ".join(text.split()) for text in decoded)
        width = len(instructions)
        return [texts[start : start + width] for start in range(0, len(texts), width)]

    def _generate(self, inputs: Any, max_new_tokens: int, **options: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )

    def _batches(self, frames: np.ndarray, texts: list[list[str]], max_new_tokens: int) -> Iterator[Any]:
        """Model inputs of (clip, text) pairs, in order, as many at once as `TOKENS_PER_FORWARD` allows."""
        pairs = [(clip, text) for clip, row in zip(frames, texts, strict=True) for text in row]
        if not pairs:
            return
        longest = max(pairs, key=lambda pair: len(pair[1]))
        tokens = self._inputs([longest])["input_ids"].shape[1] + max_new_tokens
        if self.context and tokens > self.context:
            raise ValueError(
                f"{longest[0].shape[0]} frames and a question are {tokens} tokens, and the model reads {self.context}; "
                "lower judge.num_frames or caption.num_frames, or shorten the prompt"
            )
        rows = max(1, TOKENS_PER_FORWARD // tokens)
        for start in range(0, len(pairs), rows):
            yield self._inputs(pairs[start : start + rows])

    def _inputs(self, pairs: list[tuple[np.ndarray, str]]) -> Any:
        from PIL import Image

        images = [[Image.fromarray(frame) for frame in clip] for clip, _ in pairs]
        prompts = [self._prompt(len(clip), text) for clip, text in pairs]
        options: dict[str, Any] = {"add_special_tokens": not starts_itself(self.tokenizer, prompts[0])}
        if len(images[0]) > 1 and hasattr(self.processor.image_processor, "do_image_splitting"):
            options["do_image_splitting"] = False  # tiles are for one large picture, not for each frame of a clip
        inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt", **options)
        return inputs.to(self.device, dtype=self.model.dtype)

    def _prompt(self, num_images: int, text: str) -> str:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": plain_text(text, self._control)}]
        conversation = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    def _answers(self, word: str) -> torch.Tensor:
        """Ids of the single tokens that spell `word`, with and without a space before it."""
        import torch

        spelled = [self.tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
        single = sorted({tokens[-1] for tokens in spelled if len(tokens) == 1})
        if not single:
            raise UserError(
                f"{self.ref.path}: its tokenizer has no single token for {word!r}; a judge needs Yes and No"
            )
        return torch.tensor(single, device=self.device)
