"""What a denoiser is conditioned on, as it is kept: each distinct text once, without padding, by an id of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from models.families import Family
from models.loading import GeneratorRef
from models.placement import device_of, dtype_of
from models.plan import SamplerPlan
from models.source import content_sha256, files_of

if TYPE_CHECKING:
    from models.generator import Generator

DOMAIN = "ditmill/text/v1"
NEGATIVE = "negative_"
EMBEDS = "prompt_embeds"


@dataclass(frozen=True)
class TextEncoding:
    """What decides the embeddings of a text, beside the text."""

    encoder_sha256: str
    family: str
    max_sequence_length: int | None
    dtype: str
    """That the encoder computes in."""

    def as_metadata(self) -> dict[str, str]:
        """For the header of a file of embeddings, which holds texts."""
        return {"encoding": json.dumps(asdict(self), sort_keys=True)}

    def text_id(self, text: str, negative: bool) -> str:
        """32 hex digits. Families encode a negative prompt in another way than a prompt, so that it counts too."""
        told = [DOMAIN, self.encoder_sha256, self.family, self.max_sequence_length, self.dtype, negative, text]
        return hashlib.blake2b(json.dumps(told, separators=(",", ":")).encode(), digest_size=16).hexdigest()


def encoding_of(generator: Generator, plan: SamplerPlan) -> TextEncoding:
    """How this generator encodes texts by `plan`."""
    assert generator.family is not None
    return TextEncoding(
        encoder_sha256(generator.ref),
        generator.family.name,
        generator.text_length(plan),
        str(dtype_of(generator.ref.dtype, device_of(generator.ref.device))).removeprefix("torch."),
    )


@cache
def encoder_sha256(ref: GeneratorRef) -> str:
    """sha256 of the checkpoint's text encoders and tokenizers, and of adapters, which may reach into them."""
    folders = {name.partition("/")[0] for name in files_of(ref.path)}
    parts = sorted(name for name in folders if name.startswith(("text_encoder", "tokenizer")))
    told: list[Any] = [[name, content_sha256(f"{ref.path}/{name}")] for name in parts]
    told += [[content_sha256(path), weight] for path, weight in ref.adapters]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def text_of(family: Family, conditions: Mapping[str, np.ndarray], row: int, negative: bool) -> dict[str, np.ndarray]:
    """One sample's conditions that are text, unpadded, by the pipeline's argument without its `negative_`: prompt_embeds
    [tokens, width] float32, a mask int64 [tokens] beside it and pooled vectors [width] where the family has them.

    Empty where there is no negative text. Of a family whose denoiser sees padding as it sees text, nothing is cut.
    """
    found = {
        name.removeprefix(NEGATIVE): value[row]
        for name, value in conditions.items()
        if name.startswith(NEGATIVE) == negative and name != "image"
    }
    if not found:
        return {}
    tokens = _tokens(family, found)
    of_tokens = [name for name, value in found.items() if value.ndim == 2 or name.endswith("_mask")]
    return {name: value[:tokens] if name in of_tokens else value for name, value in found.items()}


def padded_text(kept: Mapping[str, np.ndarray], tokens: int) -> dict[str, np.ndarray]:
    """`kept` as the pipeline takes it, with zeros up to `tokens`, without the batch axis."""
    return {
        name: np.pad(value, [(0, tokens - len(value)), *[(0, 0)] * (value.ndim - 1)])
        if value.ndim == 2 or name.endswith("_mask")
        else value
        for name, value in kept.items()
    }


def _tokens(family: Family, found: Mapping[str, np.ndarray]) -> int:
    """How many tokens there are before the padding."""
    length = len(found[EMBEDS])
    mask = next((value for name, value in found.items() if name.endswith("_mask")), None)
    if mask is not None:
        seen = np.flatnonzero(mask)
    elif family.zero_pads:
        seen = np.flatnonzero(found[EMBEDS].any(axis=1))  # an encoder's own output is never a whole token of zeros
    else:
        return length
    return int(seen[-1]) + 1 if len(seen) else 1  # a text of no tokens is one of zeros: what reads it wants some
