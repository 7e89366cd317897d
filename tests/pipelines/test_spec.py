from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from pipelines.explain import leaves
from pipelines.spec import Spec, absolute_paths, load_spec, parse_spec

OPENAI = {"backend": "openai", "base_url": "https://a/v1", "model": "m"}
PROMPTS: dict[str, Any] = {"prompts": {"inline": ["a cat"]}}


def mistake(data: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_spec(data, list(overrides), source="x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({}, "prompts: is needed and missing. Where prompts come from"),
        ({"prompts": {}}, "prompts: give exactly one of prompts.path and prompts.inline"),
        ({"prompts": {"path": "a.txt", "inline": ["a"]}}, "prompts: give exactly one of"),
        ({"prompts": "a.txt"}, "prompts: expected keys and values, found 'a.txt'"),
        ({"output": {"uri": "out\0/etc"}}, "output.uri: expected Unicode text without NUL, found \\x00 at character 3"),
        ({"seed": 10**5000}, "seed: expected a number of at most 1024 bits, found one of 16,610"),
        ({"samples_per_prompt": 2**63}, "samples_per_prompt: expected a whole number of 64 bits"),
        ({"sampler": {"guidance_scale": float("inf")}}, "sampler.guidance_scale: expected a finite number, found inf"),
        ({"prompts": {"inline": ["a", 3]}}, "prompts.inline.1: expected a text or keys and values, found 3"),
        ({"prompts": {"inline": ["\ud800"]}}, "prompts.inline.0: expected Unicode text"),
        ({"promts": 1}, "promts: unknown key; did you mean prompts?"),
        ({"sampler": {"steps": 3}}, "sampler.steps: unknown key; did you mean sampler.num_inference_steps?"),
        ({"batch_size": 3}, "batch_size: unknown key; did you mean layout.batch_size?"),
        ({"buckets": [{"widht": 3}]}, "buckets.0.widht: unknown key; did you mean buckets.0.width?"),
        ({"layout": {"zzz": 3}}, "layout.zzz: unknown key; remove it, layout has batch_size, threads"),
        ({"seed": "x"}, "seed: expected a whole number, found 'x'. Enters the noise"),
        ({"seed": 2**63}, "seed: expected less than 9223372036854775808, found 9223372036854775808"),
        ({"layout": {"batch_size": 0}}, "layout.batch_size: expected at least 1, found 0. Samples denoised together"),
        (
            {"judge": {"backend": "vlm"}},
            "judge.backend: expected 'transformers', 'vllm', 'openai', 'call', 'oracle' or 'none', found 'vlm'",
        ),
        ({"judge": {"max_model_len": 99}}, "judge: max_model_len belongs to backend `vllm`; set that, or remove"),
        ({"caption": {"backend": "vllm", "token_drop": 0.1}}, "caption: token_drop belongs to backend `transformers`"),
        ({"judge": {"backend": "openai"}}, "judge: backend `openai` needs base_url and model: its name on that server"),
        (
            {"caption": {"backend": "openai", "base_url": "https://a/v1"}},
            "caption: backend `openai` needs base_url and model",
        ),
        (
            {"judge": {"base_url": "https://a/v1"}},
            "judge: base_url belongs to backend `openai`; set that, or remove base_url",
        ),
        (
            {"judge": {**OPENAI, "base_url": "http://gpu.lab:8000/v1"}},
            "judge: base_url: gpu.lab would get media and key without TLS; use https, or set allow_http: true",
        ),
        (
            {"judge": {**OPENAI, "base_url": "gpu.lab/v1"}},
            "judge: base_url: expected an http(s) URL without user, query",
        ),
        (
            {"caption": {**OPENAI, "base_url": "https://a/v1?key=b"}},
            "caption: base_url: expected an http(s) URL without",
        ),
        ({"judge": {**OPENAI, "base_url": "https://[::1/v1"}}, "judge: base_url: expected an http(s) URL without user"),
        (
            {"judge": {**OPENAI, "api_key_env": "sk-0123"}},
            "judge.api_key_env: expected the name of an environment variable, in capitals, and found something else",
        ),
        ({"judge": {**OPENAI, "concurrency": 0}}, "judge.concurrency: expected at least 1, found 0. Backend openai: "),
        (
            {"judge": {**OPENAI, "timeout": 0}},
            "judge.timeout: expected more than 0.0, found 0. Backend openai: seconds",
        ),
        ({"judge": {**OPENAI, "max_requests": 0}}, "judge.max_requests: expected at least 1, found 0. "),
        (
            {"caption": {**OPENAI, "max_total_tokens": "x"}},
            "caption.max_total_tokens: expected a whole number, found 'x'. ",
        ),
        ({"judge": {"backend": "call"}}, "judge: backend `call` needs call: 'module:function' and a version"),
        ({"judge": {"thresholds": {"a": "b"}}}, "judge.thresholds.a: expected a number, found 'b'"),
        (
            {"output": {"tensors": {"foo": "float32"}}},
            "output.tensors.foo: expected 'latents', 'noise' or 'text_embeddings', found 'foo'",
        ),
        ({"name": "My data"}, "name: expected a text like ^[a-z0-9][a-z0-9_-]*$, found 'My data'"),
        ({"buckets": []}, "buckets: expected at least 1 of them, found an empty list"),
        ({"sampler": None}, "sampler: expected keys and values, found nothing (leave the key out instead)"),
        (
            {"caption": {"styles": ["long"]}},
            "caption.styles.0: expected 'short', 'dense', 'tags' or 'structured', found 'long'",
        ),
        ({"budget": {"deadline": "soon"}}, "budget.deadline: expected an ISO 8601 time, or a duration such as 90m"),
        (
            {"layout": {"parallel": {"vae": 2}}},
            "layout: parallel.vae: 2 ranks share tiles, and vae_tiling is off; turn it on",
        ),
        ({"sampler": {"dualparal": {"frames": 2, "context": 3}}}, "sampler.dualparal: context is at most frames"),
        ({"guards": {"a": 1}}, "guards.a: "),
        ({"generators": [{"remote_code": "a/b"}]}, "generators.0: remote_code needs a revision"),
        ({1: 2}, "a key: expected a text, found 1; put it in quotes"),
        ({"score": {True: 2}}, "score.a key: expected a text, found True; put it in quotes"),
        ({"sampler": {"accelerate": [{0: 1}]}}, "sampler.accelerate.0.a key: expected a text, found 0"),
        (
            {"sampler": {"accelerate": ["first_block"]}},
            "sampler.accelerate.0: expected keys and values, found 'first_b",
        ),
        ({"sampler": {"accelerate": [{"technique": "cache"}]}}, "sampler.accelerate.0.technique: expected a technique"),
        (
            {"sampler": {"accelerate": [{"technique": "first_block", "threshold": -1}]}},
            "sampler.accelerate.0.threshold: expected a number at least 0, found -1",
        ),
        (
            {"sampler": {"accelerate": [{"technique": "first_block"}, {"technique": "taylorseer"}]}},
            "sampler.accelerate: first_block and taylorseer each decide which blocks are computed; keep one",
        ),
        ({"sampler": {"sigmas": [0.5, 0.9], "num_inference_steps": 2}}, "sampler.sigmas: expected each to be less"),
        ({"sampler": {"sigmas": [0.9]}}, "sampler.sigmas: expected one for each of num_inference_steps: 20, found 1"),
        ({"sampler": {"sigmas": [2.0]}}, "sampler.sigmas.0: expected at most 1.0, found 2.0"),
        (
            {"sampler": {"sigmas": [0.9, 0.5], "num_inference_steps": 2, "shift": 3}},
            "sampler.sigmas: they are taken as they are, found shift too; remove one of the two",
        ),
        ({"sampler": {"solver_order": 4}}, "sampler.solver_order: expected at most 3, found 4"),
    ],
)
def test_parse_spec_says_a_mistake_in_one_line(data: dict[str, Any], line: str) -> None:
    message = mistake(data if "prompts" in data or not data else {**PROMPTS, **data})
    assert message.startswith(f"x.yaml: {line}")
    assert "\n" not in message


def test_parse_spec_says_every_mistake_once() -> None:
    message = mistake({**PROMPTS, "seed": -1, "steps": 3, "buckets": [{"height": 2}, {"height": "x"}]})
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "seed",
        "buckets.0.height",
        "buckets.1.height",
        "steps",
    ]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("sampler.num_inference_steps=4", ("sampler", "num_inference_steps"), 4),
        ("sampler.guidance_scale=1", ("sampler", "guidance_scale"), 1.0),
        ("buckets.0.height=128", ("buckets", 0, "height"), 128),
        ("buckets=[{height: 32}, {height: 48}]", ("buckets", 1, "height"), 48),
        ("generators.0.model=org/model", ("generators", 0, "model"), "org/model"),
        ("caption.styles.0=dense", ("caption", "styles", 0), "dense"),
        ("caption=null", ("caption",), None),
        ("prompts.inline.0=a dog, running", ("prompts", "inline", 0), "a dog, running"),
        ("judge.thresholds.quality=0.7", ("judge", "thresholds", "quality"), 0.7),
        (
            "output.storage.endpoint_url=https://a:9000/?b=c",
            ("output", "storage", "endpoint_url"),
            "https://a:9000/?b=c",
        ),
        ("generators.0.may_train=yes", ("generators", 0, "may_train"), "yes"),
        ("budget.deadline=2026-01-01T00:00:00Z", ("budget", "deadline"), "2026-01-01T00:00:00+00:00"),
        ("budget.deadline=90m", ("budget", "deadline"), "90m"),
    ],
)
def test_set_replaces_one_value(override: str, key: tuple[str | int, ...], value: Any) -> None:
    found: Any = parse_spec(PROMPTS, [override])
    for part in key:
        found = found[part] if isinstance(part, int) or isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_set_leaves_what_it_was_given_alone_and_applies_in_order() -> None:
    data = {**PROMPTS, "buckets": [{"height": 32}]}
    spec = parse_spec(data, ["buckets.0.height=128", "buckets.0.width=96", "buckets.0.height=160"])
    assert (spec.buckets[0].height, spec.buckets[0].width) == (160, 96)
    assert data["buckets"] == [{"height": 32}]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("seed=[", "the value is not YAML"),
        ("seed=2026-99-99", "the value is not YAML"),
        ("seed=" + "9" * 5000, "the value is not YAML"),
        ("buckets.²=3", "expected a list"),
        ("buckets." + "9" * 5000 + "=3", "expected an index (0 to 0), found 9"),
        ("buckets.1.height=3", "expected an index (0 to 0), found 1"),
        ("buckets.x=3", "expected a list"),
        ("prompts.inline.0.height=3", "prompts.inline.0 holds a plain value, it has no height"),
        ("generators.0.adapters.0.uri=x", "expected an index (none, for it is empty), found 0"),
        ("sampler.stepz=3", "sampler.stepz: unknown key"),
        ("seed=many", "seed: expected a whole number, found 'many'"),
    ],
)
def test_set_says_a_mistake_in_one_line(override: str, words: str) -> None:
    message = mistake(PROMPTS, override)
    assert words in message
    assert "\n" not in message


KEYS = st.sampled_from([key for key, _ in leaves(Spec)]).map(lambda key: key.replace("buckets.", "buckets.0."))
VALUES = st.sampled_from(["1", "-1", "x", "[1]", "{a: 1}", "null", "yes", "0.5", "1e400", "2026-01-01", "[", "'"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.builds("{}={}".format, KEYS, VALUES), max_size=3))
def test_any_set_gives_a_spec_or_one_line_a_mistake(overrides: list[str]) -> None:
    try:
        parse_spec(PROMPTS, overrides)
    except UserError as error:
        assert all(": " in line for line in str(error).splitlines())


@pytest.mark.parametrize("key", [key for key, _ in leaves(Spec)])
def test_every_key_is_documented(key: str) -> None:
    description = dict(leaves(Spec))[key].description
    assert description, f"{key} has no description"
    assert description.endswith("."), f"{key}: {description!r} is no sentence"


def test_load_spec_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffname: a\nprompts: {inline: [a cat]}\ngenerators:\n- {may_train: no}\n", encoding="utf-8")
    spec = load_spec(path, ["seed=3"])
    assert (spec.name, spec.seed, spec.generators[0].may_train) == ("a", 3, "no")


TEN = ", ".join(["*x{0}"] * 10)
LAUGHS = "\n".join(["x0: &x0 [1]", *(f"x{n + 1}: &x{n + 1} [{TEN.format(n)}]" for n in range(9))]).encode()
MERGES = "\n".join(["x0: &x0 {a: 1}", *(f"x{n + 1}: &x{n + 1} {{<<: [{TEN.format(n)}]}}" for n in range(9))]).encode()
"""A billion values in ten lines; merged, each level is a list of pairs ten times as long."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "(No such file or directory); give a spec's path, or make one with `ditmill init`"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "expected keys and values, found nothing"),
        (b"- a", "expected keys and values, found list"),
        (b"a: [", "is not YAML"),
        (b"seed: 1\nname: a\nseed: 2", "seed stands twice"),
        (b"seed: 1\nprompts: {inline: [a], inline: [b]}", "inline stands twice"),
        (b"seed: !!python/object:os.system x", "is not YAML"),
        (b"seed: 2026-99-99", "is not YAML"),
        (b"seed: " + b"9" * 5000, "is not YAML"),
        (b"judge: " + b"[" * 5000, "is not YAML: it is nested too deeply"),
        (b"a: &a [*a]", "is not YAML: line 1: an anchor holds an alias of itself"),
        (LAUGHS, "is not YAML: line 7: aliases stand for more than 1,000,000 values"),
        (MERGES, "is not YAML: line 7: aliases stand for more than 1,000,000 values"),
    ],
)
def test_load_spec_says_a_mistake_in_one_line(tmp_path: Path, text: bytes | None, words: str) -> None:
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_spec(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_load_spec_takes_yaml_anchors(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("prompts: {inline: [a]}\nbuckets:\n- &b {height: 32, width: 32}\n- {<<: *b, width: 48}\n")
    assert [(bucket.height, bucket.width) for bucket in load_spec(path).buckets] == [(32, 32), (32, 48)]


def test_absolute_paths_touches_paths_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    data = {
        "prompts": {
            "path": "many/*.jsonl",
            "exclude": ["bench.txt", "s3://b/c.txt"],
            "expand": {"model": "org/llm"},
        },
        "generators": [
            {"model": "checkpoint", "adapters": [{"uri": "./lora"}]},
            {"model": "org/model"},
            {"model": "pack://tiny"},
        ],
        "judge": {"model": "~/judge", "rubric": "rubric.yaml"},
        "caption": None,
        "output": {"uri": "out/../data"},
    }
    spec = absolute_paths(parse_spec(data), tmp_path)
    assert spec.prompts.path == f"{tmp_path}/many/*.jsonl"
    assert spec.prompts.exclude == (f"{tmp_path}/bench.txt", "s3://b/c.txt")
    assert [generator.model for generator in spec.generators] == [f"{tmp_path}/checkpoint", "org/model", "pack://tiny"]
    assert spec.generators[0].adapters[0].uri == f"{tmp_path}/lora"
    assert spec.judge.model == str(Path("~/judge").expanduser())
    assert spec.judge.rubric == f"{tmp_path}/rubric.yaml"
    assert spec.output.uri == f"{tmp_path}/data"
    assert absolute_paths(spec, "/") == spec
    assert absolute_paths(parse_spec(PROMPTS)).judge.rubric == "default"
    data["judge"] = {"rubric": ["people", "mine.yaml"], "decompose": {"model": "checkpoint"}}
    spec = absolute_paths(parse_spec(data), tmp_path)
    assert spec.judge.rubric == ("people", f"{tmp_path}/mine.yaml")
    assert spec.judge.decompose is not None and spec.judge.decompose.model == f"{tmp_path}/checkpoint"


@pytest.mark.parametrize(
    "base_url", ["http://localhost:8000/v1", "http://127.0.0.3/v1", "http://[::1]:80/v1", "https://gpu.lab/v1"]
)
def test_an_endpoint_may_be_here_or_behind_tls(base_url: str) -> None:
    assert parse_spec({**PROMPTS, "judge": {**OPENAI, "base_url": base_url}}).judge.base_url == base_url
    far = {**OPENAI, "base_url": "http://gpu.lab/v1", "allow_http": True}
    assert parse_spec({**PROMPTS, "caption": far}).caption is not None


def test_a_key_in_place_of_its_variable_is_not_repeated() -> None:
    message = mistake({**PROMPTS, "caption": {**OPENAI, "api_key_env": "sk-distinctive"}})
    assert "caption.api_key_env" in message and "distinctive" not in message


def test_the_name_of_a_model_on_a_server_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    spec = absolute_paths(parse_spec({**PROMPTS, "judge": OPENAI, "caption": OPENAI}))
    assert spec.caption is not None
    assert spec.judge.model == spec.caption.model == "m"
