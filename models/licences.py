"""What a checkpoint's licence says about training other models on its outputs.

A reading of the licences' own words, to warn in time; it is no legal advice. What is not in the table is `unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

MayTrain = Literal["yes", "no", "unknown"]

_PERMISSIVE = "permissive licence: it says nothing about outputs"
_RAIL = "outputs are yours, but a model trained on them must keep the licence's use restrictions"

_KNOWN: dict[str, tuple[MayTrain, str]] = {
    "apache-2.0": ("yes", _PERMISSIVE),
    "mit": ("yes", _PERMISSIVE),
    "bsd-2-clause": ("yes", _PERMISSIVE),
    "bsd-3-clause": ("yes", _PERMISSIVE),
    "cc0-1.0": ("yes", _PERMISSIVE),
    "cc-by-4.0": ("yes", "permissive licence: give credit"),
    "openrail": ("yes", _RAIL),
    "openrail++": ("yes", _RAIL),
    "creativeml-openrail-m": ("yes", _RAIL),
    "bigscience-openrail-m": ("yes", _RAIL),
    "gemma": ("yes", "a model trained on outputs to act like Gemma is a derivative and keeps its use restrictions"),
    "llama3.1": ("yes", "allowed, if the trained model's name begins with Llama"),
    "llama3.2": ("yes", "allowed, if the trained model's name begins with Llama"),
    "llama3.3": ("yes", "allowed, if the trained model's name begins with Llama"),
    "qwen": ("yes", "allowed, if the trained model says that it was built or improved with Qwen"),
    "flux-1-dev-non-commercial-license": ("no", "outputs may not train a model that competes with FLUX.1 [dev]"),
    "tencent-hunyuan-community": ("no", "outputs may not improve any model but Hunyuan and its derivatives"),
    "stabilityai-ai-community": ("no", "outputs may not create or improve any other foundational generative model"),
    "stabilityai-nc-research-community": ("no", "research only, and outputs may not improve other foundation models"),
    "llama2": ("no", "outputs may not improve any other large language model"),
    "llama3": ("no", "outputs may not improve any other large language model"),
    "tongyi-qianwen": ("no", "outputs may not improve any other large language model"),
    "ltx-video-open-weights": ("unknown", "read what it says about outputs for your use"),
    "cogvideox-license": ("unknown", "it asks for a registration in commercial use; read what it says about outputs"),
    "nvidia-non-commercial": ("unknown", "non-commercial use only; it is silent on outputs"),
    "cc-by-nc-4.0": ("unknown", "non-commercial use only; whether that reaches trained models is disputed"),
    "qwen-research": ("unknown", "non-commercial use only"),
}

_ALIASES = {
    "apache 2.0": "apache-2.0",
    "apache2": "apache-2.0",
    "flux-1-dev": "flux-1-dev-non-commercial-license",
    "flux.1-dev": "flux-1-dev-non-commercial-license",
    "tencent hunyuan community": "tencent-hunyuan-community",
    "hunyuan": "tencent-hunyuan-community",
    "stabilityai": "stabilityai-ai-community",
    "stability ai community": "stabilityai-ai-community",
    "stable-diffusion-3": "stabilityai-ai-community",
    "ltx": "ltx-video-open-weights",
    "cogvideox": "cogvideox-license",
    "nsclv": "nvidia-non-commercial",
}
"""Beginnings of other spellings."""

_TEXTS = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "flux.1 [dev] non-commercial": "flux-1-dev-non-commercial-license",
    "tencent hunyuan": "tencent-hunyuan-community",
    "stability ai community license": "stabilityai-ai-community",
    "openrail++": "openrail++",
    "openrail": "openrail",
    "ltx": "ltx-video-open-weights",
    "cogvideox license": "cogvideox-license",
    "qwen license": "qwen",
    "tongyi qianwen": "tongyi-qianwen",
}
"""Words that the beginning of a LICENSE file is known by."""


@dataclass(frozen=True)
class Licence:
    """A model's licence, and whether its outputs may train other models."""

    name: str
    may_train: MayTrain
    why: str


def licence_of(folder: str, uri: str, override: tuple[str | None, str | None] | None = None) -> Licence:
    """Licence of the checkpoint in `folder`, from its README's front matter, else its LICENSE file.

    `override` is what the spec says, (licence, may_train); what it gives wins over what is found.
    """
    licence, may_train = override or (None, None)
    name = licence or _from_card(Path(folder)) or _from_text(Path(folder)) or "unknown"
    known = _KNOWN.get(_canonical(name))
    if may_train is not None:
        return Licence(name, cast(MayTrain, may_train), "the spec says so (generators.may_train)")
    if name == "unknown":
        return Licence(name, "unknown", f"{uri} states no licence; set generators.licence once you have read it")
    if known is None:
        return Licence(name, "unknown", "this licence is not in ditmill's table; read it and set generators.may_train")
    return Licence(_canonical(name), *known)


def _canonical(name: str) -> str:
    text = name.strip().lower()
    if text in _KNOWN:
        return text
    return next((known for beginning, known in _ALIASES.items() if text.startswith(beginning)), text)


def _from_card(folder: Path) -> str | None:
    card = _read(folder / "README.md")
    if not card.startswith("---"):
        return None
    try:
        header: Any = yaml.safe_load(card.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return None
    if not isinstance(header, dict):
        return None
    name = header.get("license")
    if name in (None, "other"):
        name = header.get("license_name") or name
    if isinstance(name, list):
        name = name[0] if name else None
    return None if name in (None, "other") else str(name)


def _from_text(folder: Path) -> str | None:
    for file in sorted(folder.glob("LICEN[SC]E*")):
        beginning = _read(file)[:2000].lower()
        for words, name in _TEXTS.items():
            if words in beginning:
                return name
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
