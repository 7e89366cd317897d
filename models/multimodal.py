"""Judging and captioning by a multimodal model of transformers, in process.

A clip is shown as a series of images, which every image-text-to-text family takes. The frames come first in the
conversation and the question last, so a clip is read once, and every question and caption goes on from its keys and values:

    frames -> the conversation up to the question -> keys and values, one row a clip     (see prefix.py)
    rows of them, forked, and a question each -> the first token's logits, or a greedy text

Prefixes of as many frames of one size are equally long, and texts of one length are answered together. Nothing is padded:
that was measured to cost more than smaller batches do.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from infra.errors import UserError
from infra.telemetry import log
from models.chat import starts_itself
from models.conversation import Conversation, cannot_load
from models.gumbel import GumbelNoise, key_of
from models.placement import device_of, dtype_of, quiet
from models.prefix import Place, Prefix, Prefixes
from models.structured import fill
from models.token_drop import only, read_tokens
from models.weights import refuse_missing

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

TOKENS_PER_FORWARD = 32768
"""Most tokens in one forward pass, and of clips whose keys and values are kept: what bounds memory, whatever the batch."""


@dataclass(frozen=True)
class MultimodalRef:
    """Which model: picklable, and the key under which a process keeps it loaded."""

    path: str  # local folder in transformers' checkpoint format
    dtype: str = "auto"  # bfloat16 on an accelerator, float32 on a CPU
    device: str = "auto"
    revision: str | None = None
    token_drop: float = 0.0  # see token_drop.py; 0 reads every vision token
    section: str = field(default="judge", compare=False)  # of the spec, for errors


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
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.ref = ref
        self.device = device_of(ref.device)
        key = f"{ref.section}.model"
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
                raise cannot_load(key, ref.path, error) from error
        refuse_missing(info["missing_keys"], key, ref.path)
        self.conversation = Conversation(self.processor, key, ref.path)
        self.tokenizer = self.conversation.tokenizer
        self.model = model.to(self.device).eval()
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._yes, self._no = (
            torch.tensor(self.conversation.spelled(word), device=self.device) for word in ("Yes", "No")
        )
        self._prefixes = Prefixes(TOKENS_PER_FORWARD)
        self._reads_whole = False

    def p_yes(self, frames: np.ndarray, questions: list[list[str]]) -> np.ndarray:
        """The probability of "Yes" over "Yes" and "No" at the first position of the answer.

        `frames` is uint8 [n, T, H, W, 3] (images: T = 1), `questions` holds at most q texts for each clip. Returns
        float32 [n, q]; NaN where a clip has fewer, or the model's logits are not finite. Raises ValueError where a question
        and the frames are more than the model reads.
        """
        import torch

        found = np.full((len(frames), max(map(len, questions), default=0)), np.nan, dtype=np.float32)
        for places, logits in self._answers(frames, questions, None):
            pair = torch.stack([torch.logsumexp(logits[:, ids], dim=-1) for ids in (self._yes, self._no)], dim=-1)
            found[tuple(np.transpose(places))] = torch.softmax(pair, dim=-1)[:, 0].cpu().numpy()
        return found

    def caption(self, frames: np.ndarray, instructions: list[str], max_new_tokens: int) -> list[list[str]]:
        """Greedy answers to each instruction, for each clip: n lists of len(instructions) texts.

        `frames` is uint8 [n, T, H, W, 3].
        """
        return self.answer(frames, [instructions] * len(frames), max_new_tokens)

    def answer(
        self, frames: np.ndarray, texts: list[list[str]], max_new_tokens: int, temperature: float = 0.0
    ) -> list[list[str]]:
        """Answers to the texts asked of each clip; at a temperature above 0 drawn, alike for one clip and text whatever
        stands beside them."""
        answers = [[""] * len(row) for row in texts]
        for places, tokens in self._answers(frames, texts, max_new_tokens, temperature):
            decoded = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for (clip, at), text in zip(places, decoded, strict=True):
                answers[clip][at] = " ".join(text.split())
        return answers

    def structured(
        self,
        frames: np.ndarray,
        instruction: str,
        schema: Mapping[str, Any],
        max_new_tokens: int,
        temperature: float = 0.0,
    ) -> list[Any]:
        """A value that `schema` describes for each clip, leaf by leaf (see structured.py): it needs no instruction."""
        return fill(self, frames, schema, max_new_tokens, temperature)

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """What the vision tower sees in clips, float32 [n, d] of length 1: its tokens as the language model gets them,
        averaged over places and frames. `frames` is uint8 [n, T, H, W, 3]. UserError for a family that gives none."""
        import torch

        inputs = self._inputs([(clip, "") for clip in frames])
        features = getattr(self.model, "get_image_features", None)
        if features is None:
            raise UserError(f"embedding.model: {self.ref.path}: its family has no image features; give embedding.call")
        images = {name: inputs[name] for name in inspect.signature(features).parameters if name in inputs}
        with torch.inference_mode():
            found = features(**images)
            found = getattr(found, "pooler_output", found)
            tokens = found if isinstance(found, torch.Tensor) else torch.cat([each.flatten(0, -2) for each in found])
            pooled = tokens.float().reshape(len(frames), -1, tokens.shape[-1]).mean(dim=1)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()

    def _answers(
        self, frames: np.ndarray, texts: list[list[str]], max_new_tokens: int | None, temperature: float = 0.0
    ) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
        """Answers to the texts asked of each clip, as many at once as `TOKENS_PER_FORWARD` allows and in no order of theirs:
        which (clip, text) they answer, and the new token ids, [rows, at most max_new_tokens]; where that is None, the logits
        of the first one, float32 [rows, vocabulary]."""
        pairs = [(clip, at) for clip, row in enumerate(texts) for at in range(len(row))]
        if not pairs:
            return
        clip, at = max(pairs, key=lambda pair: len(texts[pair[0]][pair[1]]))
        longest = self._inputs([(frames[clip], texts[clip][at])])["input_ids"]
        tokens = longest.shape[1] + (max_new_tokens or 1)
        if self.context and tokens > self.context:
            raise ValueError(
                f"{frames.shape[1]} frames and a question are {tokens} tokens, and the model reads {self.context}; "
                "lower judge.num_frames or caption.num_frames, or shorten the prompt"
            )
        rows = max(1, TOKENS_PER_FORWARD // tokens)
        tail = self._tail(frames.shape[1], texts[clip][at])
        prefix = longest[:, : -len(tail)]
        if longest[0, prefix.shape[1] :].tolist() == tail:
            for start in range(0, len(frames), rows):
                clips = range(start, min(start + rows, len(frames)))
                for some, places, tails in self._in_groups(frames, texts, clips, prefix, rows):
                    noise = _noise(frames, texts, some, temperature)
                    yield some, self._go_on(places, prefix, tails, max_new_tokens, noise)
        elif self.ref.token_drop and frames.shape[1] > 1:
            raise UserError(f"{self.ref.section}.token_drop: {self.ref.path}: its family cannot; set 0")
        else:  # a family that writes frames and text otherwise than all that were tried
            if not self._reads_whole:
                self._reads_whole = True
                log().warning("clips are read anew for each question and caption", model=self.ref.path)
            for some in _cut(pairs, rows):
                inputs = self._inputs([(frames[clip], texts[clip][at]) for clip, at in some])
                yield some, self._generate(inputs, max_new_tokens, _noise(frames, texts, some, temperature))

    def _in_groups(
        self, frames: np.ndarray, texts: list[list[str]], clips: range, prefix: torch.Tensor, rows: int
    ) -> Iterator[tuple[list[tuple[int, int]], list[Place], list[list[int]]]]:
        """At most `rows` equally long texts of clips that were read together: which (clip, text), where the clip was read,
        and the token ids of the text."""
        groups: dict[tuple[Prefix, int], list[tuple[tuple[int, int], Place, list[int]]]] = defaultdict(list)
        for clip, place in zip(clips, self._read(frames[clips.start : clips.stop], prefix), strict=True):
            for at, text in enumerate(texts[clip]):
                tail = self._tail(frames.shape[1], text)
                groups[place.prefix, len(tail)].append(((clip, at), place, tail))
        for group in groups.values():
            for some in _cut(group, rows):
                yield [which for which, _, _ in some], [place for _, place, _ in some], [tail for *_, tail in some]

    def _read(self, frames: np.ndarray, prefix: torch.Tensor) -> list[Place]:
        """Where each clip has been read; those that have not are, together. `prefix`: token ids [1, length]."""
        import torch

        found = [self._prefixes.find(clip) for clip in frames]
        groups: dict[int, list[int]] = defaultdict(list)
        columns: dict[int, np.ndarray] = {}
        for at, place in enumerate(found):
            if place is None:
                columns[at] = self._columns(frames[at], prefix)
                groups[len(columns[at])].append(at)
        for length, new in groups.items():
            inputs = self._inputs([(frames[at], "") for at in new])
            whole = inputs["input_ids"].shape
            assert (inputs["input_ids"][:, : prefix.shape[1]] == prefix).all()
            cut = {
                name: value[:, : prefix.shape[1]] if value.shape[:2] == whole else value
                for name, value in inputs.items()
            }
            dropped = prefix.shape[1] - length
            kept = torch.tensor(np.stack([columns[at] for at in new]), device=self.device)
            with torch.inference_mode(), only(self.model, kept) if dropped else contextlib.nullcontext():
                cache = self.model.base_model(**cut, use_cache=True).past_key_values
            deltas = getattr(self.model.base_model, "rope_deltas", None)
            read = Prefix(cache, length, len(new), None if deltas is None else deltas[:1] + dropped)
            for at, place in zip(new, self._prefixes.keep(read, frames[new]), strict=True):
                found[at] = place
        return cast("list[Place]", found)

    def _columns(self, clip: np.ndarray, prefix: torch.Tensor) -> np.ndarray:
        """Which tokens of a prefix [1, length] the clip is read by, int64."""
        columns = np.arange(prefix.shape[1])
        if not self.ref.token_drop or len(clip) == 1:
            return columns
        images = columns[(prefix[0] == self.model.config.image_token_id).cpu().numpy()]
        read = np.ones(len(columns), dtype=bool)
        read[images] = read_tokens(clip, len(images) // len(clip), self.ref.token_drop).ravel()
        return columns[read]

    def _go_on(
        self,
        places: list[Place],
        prefix: torch.Tensor,
        tails: list[list[int]],
        max_new_tokens: int | None,
        noise: GumbelNoise | None,
    ) -> torch.Tensor:
        """As `_answers` gives them, for one of its groups."""
        import torch

        read = places[0].prefix
        # Of what is in the cache only the number of tokens still matters.
        before = prefix[:, : read.length].expand(len(tails), -1)
        ids = torch.cat([before, torch.tensor(tails, device=self.device)], dim=1)
        if read.deltas is not None:
            self.model.base_model.rope_deltas = read.deltas
        cache = read.rows([place.row for place in places])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        return self._generate(inputs, max_new_tokens, noise)

    def _tail(self, num_images: int, text: str) -> list[int]:
        """Token ids of what comes after the last frame."""
        image = str(getattr(self.processor, "image_token", ""))
        after = self.conversation.text(num_images, text).rpartition(image or "\0")[2]
        return self.tokenizer.encode(image + after, add_special_tokens=False)[1:]

    def _generate(self, inputs: Any, max_new_tokens: int | None, noise: GumbelNoise | None) -> torch.Tensor:
        """As `_answers` gives them."""
        import torch

        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens or 1,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=None if noise is None else [noise],
                pad_token_id=self.tokenizer.pad_token_id,
                output_logits=max_new_tokens is None,
                return_dict_in_generate=True,
            )
        return (
            output.logits[0].float() if max_new_tokens is None else output.sequences[:, inputs["input_ids"].shape[1] :]
        )

    def _inputs(self, pairs: list[tuple[np.ndarray, str]]) -> Any:
        from PIL import Image

        images = [[Image.fromarray(frame) for frame in clip] for clip, _ in pairs]
        prompts = [self.conversation.text(len(clip), text) for clip, text in pairs]
        options = self.conversation.image_options(len(images[0]))
        options["add_special_tokens"] = not starts_itself(self.tokenizer, prompts[0])
        inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt", **options)
        return inputs.to(self.device, dtype=self.model.dtype)


def _noise(
    frames: np.ndarray, texts: list[list[str]], asked: list[tuple[int, int]], temperature: float
) -> GumbelNoise | None:
    """The noise with which those (clip, text) are sampled; None at temperature 0."""
    if not temperature:
        return None
    return GumbelNoise([key_of(frames[clip], texts[clip][at]) for clip, at in asked], temperature)


def _cut(items: list[T], size: int) -> Iterator[list[T]]:
    """The items, at most `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
