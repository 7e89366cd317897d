"""Sections of the spec for models that look at media: the judge, the captioner, and the endpoint that either may ask."""

from __future__ import annotations

import math
import re
from ipaddress import ip_address
from typing import Annotated, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from models.facts import Score
from pipelines.sections import DEFAULT_PACK, Section
from stages.rubric import OVERALL, built_in_rubrics

ModelBackend = Literal["transformers", "vllm", "openai"]
MODEL_BACKENDS: tuple[str, ...] = get_args(ModelBackend)
BACKENDS = (
    "transformers in process; vllm: on a GPU, where that is installed; openai: a server that speaks the OpenAI API"
)


class Viewer(Section):
    """A model that looks at media, in this process, in vLLM or behind an endpoint: what judge and captioner share."""

    backend: str = "transformers"
    model: str = Field(
        DEFAULT_PACK,
        description="A multimodal model in transformers' checkpoint format; for openai, its name on the server.",
    )
    revision: str | None = Field(None, description="Hub revision.")
    token_drop: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Backend transformers: leave out vision tokens under which pixels differ by at most this share of full"
        " scale, on average, from what was read there before; 0 reads all. Alike for judge and captioner, a clip is read once"
        " for both.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="Backend vllm: GPUs that the model lies over; as many as compute.resources.judge.gpus."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Backend vllm: share of a GPU's memory that it takes; left out, nine tenths of the actor's share of the"
        " GPU. Alike for judge and captioner, as max_model_len, one engine serves both.",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Backend vllm: tokens of question and answer at most; left out, what the model reads."
    )
    base_url: str | None = Field(
        None, description="Backend openai: what comes before /chat/completions, such as https://api.openai.com/v1."
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Backend openai: environment variable of the workers that holds the API key; the key itself never stands"
        " in a spec.",
    )
    allow_http: bool = Field(False, description="Backend openai: allow a base_url without TLS on another machine.")
    concurrency: int = Field(8, ge=1, description="Backend openai: requests under way at a time, of each worker.")
    timeout: float = Field(
        120, gt=0, description="Backend openai: seconds without an answer until a request is given up and repeated."
    )
    max_requests: int | None = Field(
        None,
        ge=1,
        description="Backend openai: requests of each worker, after which the run stops; a resume begins to count anew, and"
        " answers that are kept count nothing.",
    )
    max_total_tokens: int | None = Field(
        None,
        ge=1,
        description="Backend openai: the same in tokens, as the server counts them, of questions and answers.",
    )

    @field_validator("api_key_env")
    @classmethod
    def _is_variable(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):  # what it is instead may be the key itself
            raise ValueError("expected the name of an environment variable, in capitals, and found something else")
        return value

    @model_validator(mode="after")
    def _endpoint_is_sound(self) -> Self:
        for key in ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len"):
            if self.backend != "vllm" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to backend `vllm`; set that, or remove {key}")
        if self.token_drop and self.backend in ("vllm", "openai"):
            raise ValueError("token_drop belongs to backend `transformers`; remove it")
        if self.backend != "openai":
            if self.base_url is not None:
                raise ValueError("base_url belongs to backend `openai`; set that, or remove base_url")
            return self
        if self.base_url is None or self.model.startswith("pack://"):
            raise ValueError("backend `openai` needs base_url and model: its name on that server")
        try:
            url = urlsplit(self.base_url)
            host = url.hostname
        except ValueError:
            host = None
        if not host or not re.fullmatch(r"https?://[^\s?#@\\]+", self.base_url):
            raise ValueError("base_url: expected an http(s) URL without user, query and fragment")
        if url.scheme == "http" and not self.allow_http and not _is_loopback(host):
            raise ValueError(
                f"base_url: {host} would get media and key without TLS; use https, or set allow_http: true"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Bar(Section):
    """A threshold that is found from data: the lowest with this precision, or that of the best share."""

    precision: float | None = Field(
        None, gt=0, lt=1, description="Least share of good samples among those that clear it, calibrated on `labels`."
    )
    labels: str | None = Field(
        None,
        description="CSV of sample_id,label with samples of this dataset; left out, the labels that `ditmill annotate"
        " --labels` stored.",
    )
    keep: float | None = Field(
        None, gt=0, lt=1, description="Share of the samples to keep, the best ones by this score."
    )
    first: int | None = Field(
        None,
        ge=20,
        description="With keep: found on as many samples, and then fixed for the dataset; left out, each release keeps that"
        " share of its own.",
    )

    @model_validator(mode="after")
    def _is_one_aim(self) -> Bar:
        if (self.precision is None) == (self.keep is None):
            raise ValueError("expected a number, {precision: 0.98, labels: labels.csv} or {keep: 0.6}")
        if self.labels is not None and self.precision is None:
            raise ValueError("labels belongs to precision; set that, or remove labels")
        if self.first is not None and self.keep is None:
            raise ValueError("first belongs to keep; set that, or remove first")
        return self

    def __str__(self) -> str:
        if self.precision is not None:
            return f"precision {self.precision:g}"
        return f"the best {self.keep:g}" + (f" of the first {self.first}" if self.first else "")


def _kind(value: object) -> str:
    return "<bar>" if isinstance(value, dict | Bar) else "<number>"


Threshold = Annotated[Annotated[float, Tag("<number>")] | Annotated[Bar, Tag("<bar>")], Discriminator(_kind)]


class Screen(Viewer):
    """A cheaper judge that is asked first; the judge is asked only where this one is not sure."""

    backend: ModelBackend = Field("transformers", description=f"{BACKENDS}.")
    num_frames: int = Field(4, ge=1, description="Frames shown to it, evenly spaced.")
    questions: tuple[str, ...] = Field((), description="Names of the rubric's questions that it is asked; none, all.")
    reject: float = Field(
        0.1, ge=0, le=1, description="A sample with an answer below this is rejected, without asking the judge."
    )
    accept: float | None = Field(
        None,
        ge=0,
        le=1,
        description="A sample with all answers at or above this is accepted, without asking the judge; left out, none is.",
    )

    @model_validator(mode="after")
    def _leaves_a_band(self) -> Screen:
        if self.accept is not None and self.accept < self.reject:
            raise ValueError(f"accept: expected at least reject ({self.reject:g}), found {self.accept:g}")
        return self


class Decompose(Section):
    """Questions about each fact of a prompt, and one score for them all: `decomposed`."""

    model: str | None = Field(None, description="A chat model that splits prompts into yes/no questions.")
    revision: str | None = Field(None, description="Hub revision.")
    call: str | None = Field(
        None,
        description="Or your own code, module:function: takes a list of prompts, returns a list of questions for each; the"
        " shapes world has models.pack.decompose:decompose.",
    )
    version: str | None = Field(None, description="Version of that code, part of what is recorded with each score.")
    instruction: str | None = Field(
        None,
        description="What the model is asked, with {prompt}; left out, one in English. The answer must have the form that"
        " docs/rubrics.md shows.",
    )
    max_questions: int = Field(12, ge=1, description="Questions of one prompt; what comes after is left out.")
    max_new_tokens: int = Field(768, ge=1, description="Longest answer of the model, in tokens.")
    score: Score = Field(
        "least",
        description="least: the least P(yes); mean: the mean, where a fact counts 0 if one that it needs does not hold.",
    )
    threshold: float = Field(
        0.5, ge=0, le=1, description="Least score of an accepted sample; judge.thresholds.decomposed replaces it."
    )

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if (self.model is None) == (self.call is None):
            raise ValueError("expected either model, a chat model, or call: 'module:function'")
        if self.call is not None and not self.version:
            raise ValueError("call needs a version")
        if self.instruction is not None and "{prompt}" not in self.instruction:
            raise ValueError("instruction must contain {prompt}")
        if (self.model or "").startswith("pack://"):
            raise ValueError(
                "a pack's language model expands prompts and splits none; name a chat model, or call:"
                " models.pack.decompose:decompose with version: '1'"
            )
        return self


class Judge(Viewer):
    """The model that scores, and the bar."""

    backend: Literal["transformers", "vllm", "openai", "call", "oracle", "none"] = Field(
        "transformers",
        description=f"{BACKENDS}; call: your own code; oracle: classical vision that knows the shapes world and nothing else,"
        " for tests and benches; none: what ScoreMedia leaves is accepted.",
    )
    call: str | None = Field(
        None, description="module:function of backend `call`: takes a batch, returns {question: [n] floats}."
    )
    version: str | None = Field(None, description="Version of that code, recorded with each score.")
    rubric: str | tuple[str, ...] = Field(
        "default",
        description=f"Questions: a YAML file, or one of {', '.join(built_in_rubrics())}; a list asks the questions of all.",
    )
    decompose: Decompose | None = Field(None, description="Ask about each fact of the prompt by itself as well.")
    thresholds: dict[str, Threshold] = Field(
        {},
        description="Least P(yes) for each question and for `overall`, their weighted mean; replaces the rubric's own."
        " {precision: 0.98, labels: labels.csv} and {keep: 0.6} find one.",
    )
    num_frames: int = Field(8, ge=1, description="Frames shown to the model, evenly spaced.")
    screen: Screen | None = Field(None, description="A cheaper judge that is asked first.")

    @model_validator(mode="after")
    def _call_is_named(self) -> Judge:
        if self.backend == "call" and not (self.call and self.version):
            raise ValueError("backend `call` needs call: 'module:function' and a version")
        if not self.rubric:
            raise ValueError("rubric: expected at least one of " + ", ".join(built_in_rubrics()))
        if self.decompose is not None and self.backend not in MODEL_BACKENDS:
            raise ValueError(f"decompose is asked of a model, not of backend `{self.backend}`; remove it")
        return self

    @model_validator(mode="after")
    def _is_about_a_model(self) -> Judge:
        if self.backend == "call" and OVERALL in self.thresholds:
            raise ValueError(
                "thresholds.overall needs a rubric, which backend `call` has none of; name a score of its own"
            )
        if self.screen is not None and self.backend not in MODEL_BACKENDS:
            raise ValueError(
                f"screen belongs to backends `transformers`, `vllm` and `openai`, found {self.backend}; remove it"
            )
        return self

    @property
    def bars(self) -> dict[str, float]:
        """The thresholds as they stand; one that is to be found is below every answer."""
        return {name: bar if isinstance(bar, float) else -math.inf for name, bar in self.thresholds.items()}


class Caption(Viewer):
    """The model that captions what was accepted."""

    backend: ModelBackend = Field("transformers", description=f"{BACKENDS}.")
    model: str = Field(
        DEFAULT_PACK,
        description="A multimodal model; the judge's own is loaded once for both. For openai, its name on the server.",
    )
    styles: tuple[Literal["short", "dense", "tags", "structured"], ...] = Field(
        ("short", "dense"),
        description="Captions to write; the first is the sample's. tags: a list in order of the alphabet; structured: JSON"
        " held to `json_schema`. With `sampler.dualparal.scenes`, each of every scene too.",
    )
    json_schema: str | None = Field(
        None,
        description="JSON schema of style structured, a file; without it, ditmill's own: subjects, background, light, camera,"
        " style. A leaf's description is its question.",
    )
    verify: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Least P(yes) of a caption's statements, each asked back of the judge's model; what is below is left out."
        " 0 asks nothing. Where the judge is no model, the captioner is asked.",
    )
    max_new_tokens: int = Field(96, ge=1, description="Longest caption, in tokens.")
    num_frames: int = Field(8, ge=1, description="Frames shown to the model.")
